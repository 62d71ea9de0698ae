"""Softmax attention of shared seed queries over each sample's tokens, on packed jagged sequences."""

from pallas_kernels.seed_attention.api import packed_seed_attention, seed_attention

__all__ = ["packed_seed_attention", "seed_attention"]
