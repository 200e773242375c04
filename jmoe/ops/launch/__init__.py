"""The one door to Triton: plans as launches in JAX.

Everything that needs Triton, jax-triton or a GPU happens in lowering, so what leads here can be traced on any machine.
"""
