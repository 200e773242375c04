"""jax-triton's rule for dead code, with the arguments that JAX 0.12 gives."""

from types import ModuleType
from typing import Any

import jax
from jax.interpreters import partial_eval


def accept_live_inputs(triton_lib: ModuleType) -> None:
    """Makes a bare jax_triton.triton_call under jit lower on JAX 0.12; leaves it alone on earlier versions.

    JAX 0.12 tells dead-code rules which inputs are live, an argument that jax-triton 0.4.1's rule does not take. jmoe's
    primitives lower their launches themselves and meet no such rule; launches traced directly do, such as
    jmoe.ops.launch.layer.route_and_sort.
    """
    if jax.__version_info__ >= (0, 12):
        partial_eval.dce_rules[triton_lib.triton_kernel_call_p] = _keep  # type: ignore[assignment]  # as of 0.11


def _keep(used_outputs: list[bool], live_inputs: list[bool], equation: Any) -> tuple[list[bool], Any]:
    """The call stays with all its inputs, as it does by jax-triton's own rule."""
    return [True] * len(equation.invars), equation
