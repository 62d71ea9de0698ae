"""Operators on packed, jagged samples for JAX, with Hopper kernels and an XLA path for everything else."""

from pallas_kernels.dispatch import SlowerPathWarning
from pallas_kernels.gdpa import gdpa, gdpa_block

__all__ = ["SlowerPathWarning", "gdpa", "gdpa_block"]
