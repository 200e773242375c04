"""The PyTorch side: the same kernels on torch tensors, and the bridge to them."""

from jmoe.interop.dlpack import to_jax as to_jax
from jmoe.interop.dlpack import to_torch as to_torch
from jmoe.interop.moe import moe as moe

__all__ = ["moe", "to_jax", "to_torch"]
