"""Softmax attention of every token over its neighbours in the same sample, on packed jagged sequences."""

from pallas_kernels.sliding_window.api import sliding_window_attention

__all__ = ["sliding_window_attention"]
