"""Reads a checkpoint onto a mesh: each process only the slices that its devices have, experts one by one."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jmoe.checkpoint.directory import Checkpoint
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layout import Layout, split_along
from jmoe.gpt_oss.stack_on_mesh import Index, Room
from jmoe.gpt_oss.weights import EXPERTS, LayerWeights, Linear, sizes
from jmoe.ops.experts import Experts
from jmoe.ops.mxfp4 import Mxfp4


@dataclasses.dataclass(frozen=True)
class MeshReader:
    """Reads one checkpoint's tensors to where a layout has them on a mesh.

    quantize: whether dense experts are rounded to MXFP4; packed: whether MXFP4 ones are packed.
    """

    checkpoint: Checkpoint
    config: Config
    mesh: Mesh
    layout: Layout
    quantize: bool
    packed: bool

    @property
    def room(self) -> Room:
        """For all layers."""
        return Room(self.mesh, self.config.num_hidden_layers)

    def whole(self, name: str) -> Array:
        """A tensor that every device has."""
        return self.tensor(name, P())

    def tensor(self, name: str, spec: P) -> Array:
        """A tensor of the view, split so."""
        shape = self.checkpoint.spec(name).shape
        return self.room.read(shape, spec, lambda index: self.checkpoint.slices(name, *index))

    def stack(self, layers: Iterable[int]) -> LayerWeights:
        """The weights of these layers, which are all of them; the iterable may say how far it is."""
        stack = None
        for index in layers:
            of_layer = self.dense_part(index)
            if stack is None:
                stack = self.empty(of_layer)
            specs = self.layout.layers(stack.experts)
            stack = jax.tree.map(
                lambda leaf, room, spec, index=index: room if leaf is None else self.room.put(room, leaf, spec, index),
                of_layer,
                stack,
                specs,
                is_leaf=lambda leaf: leaf is None,  # of experts, which follow one by one
            )
            experts = {name: self.put_experts(getattr(stack.experts, name), index, name) for name in EXPERTS}
            stack = dataclasses.replace(stack, experts=dataclasses.replace(stack.experts, **experts))
        assert stack is not None
        return stack

    def dense_part(self, layer: int) -> LayerWeights:
        """One layer's arrays, with None for the experts' weights."""
        prefix, heads = f"model.layers.{layer}.", self.layout.heads
        mlp = f"{prefix}mlp."
        of_experts = split_along(self.layout.of_experts)

        def bias(name: str) -> Array:
            return self.tensor(f"{mlp}experts.{name}_proj_bias", of_experts)

        return LayerWeights(
            attention_norm=self.whole(f"{prefix}input_layernorm.weight"),
            qkv=Linear(self.qkv(prefix, "weight"), self.qkv(prefix, "bias")),
            o=Linear(
                self.tensor(f"{prefix}self_attn.o_proj.weight", split_along(None, heads)),
                self.whole(f"{prefix}self_attn.o_proj.bias"),
            ),
            sinks=self.tensor(f"{prefix}self_attn.sinks", split_along(heads)),
            moe_norm=self.whole(f"{prefix}post_attention_layernorm.weight"),
            router=Linear(self.whole(f"{mlp}router.weight"), self.whole(f"{mlp}router.bias")),
            experts=Experts(None, bias("gate_up"), None, bias("down")),  # type: ignore[arg-type]
        )

    def qkv(self, prefix: str, kind: str) -> Array:
        """The rows of q, k and v that each device's heads have, behind each other."""
        parts = self.layout.size(self.mesh, self.layout.heads)
        names = {name: f"{prefix}self_attn.{name}_proj.{kind}" for name in "qkv"}
        rows = {name: sizes(self.config)[name][0] // parts for name in names}

        def read(index: Index) -> np.ndarray:
            part = (index[0].start or 0) // sum(rows.values())
            own = (slice(part * count, (part + 1) * count) for count in rows.values())
            return np.concatenate(
                [self.checkpoint.slices(name, one) for name, one in zip(names.values(), own, strict=True)]
            )

        columns = self.checkpoint.spec(names["q"]).shape[1:]
        return self.room.read((parts * sum(rows.values()), *columns), split_along(self.layout.heads), read)

    def empty(self, of_layer: LayerWeights) -> LayerWeights:
        """Room for all layers, whose arrays are like these."""

        def experts(name: str) -> Any:
            n, k = sizes(self.config)[name]
            shape = self.config.num_local_experts, n, k
            spec = split_along(None, self.layout.of_experts)
            if self.quantize or self.checkpoint.is_packed(f"model.layers.0.mlp.experts.{name}_proj"):
                return self.room.empty_mxfp4(shape, spec, packed=self.packed)
            return self.room.empty(shape, jnp.bfloat16, spec)

        specs = self.layout.layers(of_layer.experts)
        room = jax.tree.map(lambda leaf, spec: self.room.empty(leaf.shape, leaf.dtype, spec), of_layer, specs)
        there = dataclasses.replace(room.experts, gate_up=experts("gate_up"), down=experts("down"))
        return dataclasses.replace(room, experts=there)

    def put_experts[Stack](self, stack: Stack, layer: int, projection: str) -> Stack:
        """The stack of one projection with a layer's experts, of which a device holds one beside it at a time."""
        name = f"model.layers.{layer}.mlp.experts.{projection}_proj"
        input_first = None
        if not self.checkpoint.is_packed(name) and self.quantize:
            input_first = not self.checkpoint.part(name).swapped
        devices = self.layout.size(self.mesh, *self.layout.of_experts)
        own = self.config.num_local_experts // devices
        spec = split_along(None, self.layout.of_experts)
        for number in range(own):
            one = self.one_expert_each(name, number, own, devices, input_first)
            stack = self.room.put_experts(stack, one, spec, layer, number, input_first=input_first)
            jax.block_until_ready(stack)
        return stack

    def one_expert_each(
        self, name: str, number: int, own: int, devices: int, input_first: bool | None
    ) -> Mxfp4 | Array:
        """[devices, ...]: of each device's `own` experts that of this number, as put_experts takes it."""

        def of_each(shape: tuple[int, ...], expert: Callable[[int], np.ndarray]) -> Array:
            return self.room.read(
                (devices, *shape),
                split_along(self.layout.of_experts),
                lambda index: expert((index[0].start or 0) * own + number)[None],
            )

        def stored(name: str) -> Array:
            return of_each(
                self.checkpoint.spec(name).shape[1:],
                lambda expert: self.checkpoint.slices(name, slice(expert, expert + 1))[0],
            )

        if self.checkpoint.is_packed(name):
            return Mxfp4(stored(f"{name}_blocks"), stored(f"{name}_scales"))
        k, n = self.checkpoint.spec(name).shape[1:]
        if input_first is None:
            return of_each((n, k), lambda expert: self.checkpoint.slices(name, slice(expert, expert + 1))[0].T)
        if input_first:
            return of_each((k, n), lambda expert: self.checkpoint.expert(name, expert))
        return of_each((n, k), lambda expert: self.checkpoint.expert(name, expert).T)
