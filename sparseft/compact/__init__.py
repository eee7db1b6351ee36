"""Gradients at the selected entries only: dense weight gradients never exist."""

from sparseft.compact.activation import CompactGradients, compact_gradients

__all__ = ["CompactGradients", "compact_gradients"]
