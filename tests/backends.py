"""The layer's backends behind one face, for tests of what they do alike: tensors on the CPU in and out."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import jmoe
from tests import torch_layers
from tests.tolerances import BFLOAT16, FLOAT32, GRADIENT, Tolerance
from tests.torch_layers import Layer, Weight, poisoned_results, surround, transform


class Backend(Protocol):
    """The layer and its gradients; options are `expert_offset`, an int, and `routing`, a torch_layers.Routing."""

    of_y: Tolerance
    of_gradients: Tolerance

    def moe(self, layer: Layer, **options: Any) -> Tensor:
        """y."""

    def gradients(self, layer: Layer, dy: Tensor) -> dict[str, Tensor]:
        """Of <y, dy>, by the names of torch_layers.leaves."""


class Kernels:
    """jmoe.interop.moe, every tensor in poison: in Triton's interpreter on the CPU, compiled on a GPU."""

    of_y, of_gradients = BFLOAT16, GRADIENT

    def __init__(self, device: str) -> None:
        self.device = device

    def moe(self, layer: Layer, **options: Any) -> Tensor:
        from jmoe.interop.moe import moe

        if "expert_offset" in options:
            options["expert_offset"] = torch.tensor([options["expert_offset"]], dtype=torch.int32)
        there = transform(layer, self.surrounded)
        options = {name: transform(value, self.surrounded) for name, value in options.items()}
        with poisoned_results():
            return moe(there.x, there.router_logits, there.experts, **there.options, **options).cpu()

    def gradients(self, layer: Layer, dy: Tensor) -> dict[str, Tensor]:
        from jmoe.interop.moe import moe

        with poisoned_results():
            found = torch_layers.gradients(transform(layer, self.surrounded), moe, self.surrounded(dy))
            return {name: gradient.cpu() for name, gradient in found.items()}

    def surrounded(self, tensor: Tensor) -> Tensor:
        return surround(tensor.to(self.device))


class Jax:
    """jmoe.moe: with `wide`, of the same numbers in float32, which XLA alone computes in."""

    def __init__(self, backend: str, wide: bool) -> None:
        self.backend, self.wide = backend, wide
        self.of_y, self.of_gradients = (FLOAT32, FLOAT32) if wide else (BFLOAT16, GRADIENT)

    def moe(self, layer: Layer, **options: Any) -> Tensor:
        return in_torch(self.run(layer, **options)[0])

    def gradients(self, layer: Layer, dy: Tensor) -> dict[str, Tensor]:
        return {name: in_torch(gradient) for name, gradient in self.run(layer, dy)[1].items()}

    def run(
        self, layer: Layer, dy: Tensor | None = None, routing: torch_layers.Routing | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(y, gradients of <y, dy> if dy is given), compiled, so that adapter ids are traced."""
        parts = {name: self.floats(tensor) for name, tensor in torch_layers.leaves(layer).items()}
        if routing is not None:
            options["routing"] = jmoe.Routing(in_jax(routing.experts), in_jax(routing.weights))

        def call(parts: dict[str, jax.Array], ids: jax.Array | None) -> jax.Array:
            given = {"top_k": layer.top_k, "activation": layer.activation, "backend": self.backend, **options}
            choice_bias = None if layer.choice_bias is None else in_jax(layer.choice_bias)
            given |= {"scoring": layer.scoring, "choice_bias": choice_bias}
            experts, lora = with_parts(layer, parts)
            return jmoe.moe(parts["x"], parts["router_logits"], experts, lora=lora, adapter_ids=ids, **given)

        def call_and_gradients(parts: dict[str, jax.Array], ids: jax.Array | None, dy: jax.Array) -> tuple:
            y, pullback = jax.vjp(lambda parts: call(parts, ids), parts)
            return y, pullback(dy)[0]

        ids = None if layer.adapter_ids is None else in_jax(layer.adapter_ids)
        if dy is None:
            return jax.jit(call)(parts, ids), {}
        return jax.jit(call_and_gradients)(parts, ids, self.floats(dy))

    def floats(self, tensor: Tensor) -> jax.Array:
        return in_jax(tensor).astype(jnp.float32) if self.wide else in_jax(tensor)


def with_parts(layer: Layer, parts: dict[str, jax.Array]) -> tuple[jmoe.Experts, jmoe.Lora | None]:
    """The layer's weights for JAX, those that have gradients from `parts`."""

    def weight(given: Weight | Tensor) -> jmoe.Mxfp4 | jax.Array:
        return jmoe.Mxfp4(in_jax(given.blocks), in_jax(given.scales)) if isinstance(given, Weight) else in_jax(given)

    experts = jmoe.Experts(
        weight(layer.experts.gate_up),
        parts.get("gate_up_bias"),
        weight(layer.experts.down),
        parts.get("down_bias"),
    )
    if layer.lora is None:
        return experts, None
    tensors = {field.name: getattr(layer.lora, field.name) for field in dataclasses.fields(layer.lora)}
    arrays = {name: None if tensor is None else in_jax(tensor) for name, tensor in tensors.items()}
    return experts, jmoe.Lora(**{**arrays, **{name: parts[name] for name in arrays if name in parts}})


def in_jax(tensor: Tensor) -> jax.Array:
    """A copy."""
    if tensor.dtype == torch.bfloat16:
        return jnp.asarray(tensor.float().numpy()).astype(jnp.bfloat16)
    return jnp.asarray(tensor.numpy())


def in_torch(array: jax.Array) -> Tensor:
    """A copy on the CPU."""
    copy = torch.from_numpy(np.array(array.astype(jnp.float32)))
    return copy.bfloat16() if array.dtype == jnp.bfloat16 else copy
