"""Generalised dot-product attention: `gdpa` and `gdpa_block`."""

from pallas_kernels.gdpa.api import gdpa, gdpa_block

__all__ = ["gdpa", "gdpa_block"]
