"""jax.export of functions that take jmoe's containers and call its kernels."""

import dataclasses
import json

import jax
import jax.export

from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4
from jmoe.ops.routing import Routing

TRITON_CUSTOM_CALL = "triton_kernel_call_ffi"
"""The name under which jax-triton's launches stand in an exported program."""


def allow_triton_call() -> tuple[jax.export.DisabledSafetyCheck, ...]:
    """`disabled_checks` for jax.export.export: admits jax-triton's custom call, for whose stability JAX does not vouch.

    jax.export.export(jax.jit(layer), platforms=["cuda"], disabled_checks=jmoe.allow_triton_call())(...)
    """
    return (jax.export.DisabledSafetyCheck.custom_call(TRITON_CUSTOM_CALL),)


def register_serialization() -> None:
    """Lets exported functions take and return the containers."""
    for container in (Mxfp4, PackedMxfp4, Experts, Lora, Routing):
        assert dataclasses.is_dataclass(container)
        jax.export.register_pytree_node_serialization(
            container,
            serialized_name=f"jmoe.{container.__name__}",
            serialize_auxdata=lambda auxdata: json.dumps(auxdata).encode(),
            deserialize_auxdata=lambda raw: tuple(json.loads(raw)),
        )


register_serialization()
