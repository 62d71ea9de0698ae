"""An MLP of two layers with SiLU between them, and rows that one of them masks."""

from pallas_kernels.mlp.api import masked_by_mlp, silu_mlp

__all__ = ["masked_by_mlp", "silu_mlp"]
