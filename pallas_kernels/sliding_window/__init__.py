"""Softmax attention of every token over its neighbours in the same sample, on packed jagged sequences."""

from pallas_kernels.sliding_window.api import packed_sliding_window_attention, sliding_window_attention

__all__ = ["packed_sliding_window_attention", "sliding_window_attention"]
