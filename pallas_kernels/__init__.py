"""Operators on packed, jagged samples and an MLP over many rows, for JAX: Hopper kernels, and XLA for all else."""

from pallas_kernels.dispatch import SlowerPathWarning
from pallas_kernels.gdpa import gdpa, gdpa_block
from pallas_kernels.mlp import masked_by_mlp, silu_mlp
from pallas_kernels.seed_attention import packed_seed_attention, seed_attention
from pallas_kernels.sliding_window import packed_sliding_window_attention, sliding_window_attention

__all__ = [
    "SlowerPathWarning",
    "gdpa",
    "gdpa_block",
    "masked_by_mlp",
    "packed_seed_attention",
    "packed_sliding_window_attention",
    "seed_attention",
    "silu_mlp",
    "sliding_window_attention",
]
