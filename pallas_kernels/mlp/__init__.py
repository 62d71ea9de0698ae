"""An MLP of two layers with SiLU between them."""

from pallas_kernels.mlp.api import silu_mlp

__all__ = ["silu_mlp"]
