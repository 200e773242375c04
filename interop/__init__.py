"""The PyTorch side: the same kernels on torch tensors, and the bridge to them.

Imports nothing of its own, so that one can have `jmoe.interop.dlpack` without Triton.
"""
