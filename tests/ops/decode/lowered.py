"""Operations lowered for CUDA where there is no GPU."""

import jax
import jax.numpy as jnp

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

INDEX = jax.ShapeDtypeStruct((), jnp.int32)


def lowered(function: object, *arguments: object) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def launches(function: object, *arguments: object) -> int:
    return lowered(function, *arguments).count("@triton_kernel_call_ffi")


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
