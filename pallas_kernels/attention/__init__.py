"""Hopper kernels of softmax attention over jagged samples: what sliding-window and seed attention share."""
