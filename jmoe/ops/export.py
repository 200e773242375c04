"""jax.export of functions that call jmoe's kernels."""

import jax
import jax.export

TRITON_CUSTOM_CALL = "triton_kernel_call_ffi"
"""The name under which jax-triton's launches stand in an exported program."""


def allow_triton_call() -> tuple[jax.export.DisabledSafetyCheck, ...]:
    """`disabled_checks` for jax.export.export: admits jax-triton's custom call, for whose stability JAX does not vouch.

    jax.export.export(jax.jit(layer), platforms=["cuda"], disabled_checks=jmoe.allow_triton_call())(...)
    """
    return (jax.export.DisabledSafetyCheck.custom_call(TRITON_CUSTOM_CALL),)
