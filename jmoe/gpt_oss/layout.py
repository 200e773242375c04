"""Where a model lies on a mesh: which axes split batches, experts and heads, and what each array's split is by that."""

import dataclasses
import math
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmoe.device_mesh import make_mesh
from jmoe.gpt_oss.attention_lora import AttentionLora
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.split import Split
from jmoe.gpt_oss.weights import EXPERTS, LayerWeights, Linear, LoraWeights
from jmoe.ops.experts import Experts
from jmoe.ops.mesh_axes import names_of

type AnyMesh = Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axes of a mesh, by what of a model they split; static, and the same for every model and mesh that has them.

    Attention's weights are split by heads, as Megatron's are: rows of q, k and v, columns of o. Experts are split by
    expert, and so is LoRA on them. Batches are split over `data`, and over `experts` too unless that is `heads` also:
    each device attends to its own sequences, and their tokens are gathered for the experts. Embedding, norms, router
    and head are on every device.

    data: splits batches.
    experts: splits experts.
    heads: splits heads of attention; may be the same axis as `experts`.
    fsdp: the experts are split over `data` too, and gathered layer by layer as they are stored, in four bits.

    Raises:
      ValueError: one axis is to split what it cannot, or fsdp has no data axis.
    """

    data: str | None = None
    experts: str | None = None
    heads: str | None = None
    fsdp: bool = False

    def __post_init__(self) -> None:
        for field in ("data", "experts", "heads"):
            name = getattr(self, field)
            if name is not None and (not isinstance(name, str) or not name):
                raise ValueError(f"{field} must be the name of a mesh axis, or None, got {name!r}")
        if self.data is not None and self.data in (self.experts, self.heads):
            other = "experts" if self.data == self.experts else "heads"
            raise ValueError(f"data and {other} must be different axes of the mesh, got {self.data!r} for both")
        if self.fsdp and self.data is None:
            raise ValueError("fsdp splits experts over the data axis, and there is none")

    @classmethod
    def of(cls, mesh: AnyMesh, config: Config | None = None, *, fsdp: bool = False) -> Self:
        """The layout that a mesh's axes are named for: data, expert, heads, or model for experts and heads at once.

        config: of the model, to check that it can be split so.

        Raises:
          ValueError: an axis has another name; and as `check`.
        """
        names: dict[str, str] = {}
        for name in mesh.axis_names:
            fields = {"data": ["data"], "expert": ["experts"], "heads": ["heads"], "model": ["experts", "heads"]}
            if name not in fields:
                raise ValueError(f"axes of a mesh must be named data, expert, heads or model, got {name!r}")
            for field in fields[name]:
                if field in names:
                    raise ValueError(f"{field} cannot be split over both {names[field]!r} and {name!r}")
                names[field] = name
        layout = cls(**names, fsdp=fsdp)
        if config is not None:
            layout.check(mesh, config)
        return layout

    def config_of_device(self, mesh: AnyMesh, config: Config) -> Config:
        """The model's with the heads that each device has."""
        parts = self.size(mesh, self.heads)
        return dataclasses.replace(
            config,
            num_attention_heads=config.num_attention_heads // parts,
            num_key_value_heads=config.num_key_value_heads // parts,
        )

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes that split something."""
        return tuple(dict.fromkeys(name for name in (self.data, self.experts, self.heads) if name is not None))

    @property
    def of_experts(self) -> tuple[str, ...]:
        """The axes that split the experts' weights."""
        return tuple(name for name in (self.experts, self.data if self.fsdp else None) if name is not None)

    @property
    def axes_of_batch(self) -> tuple[str, ...]:
        """The axes that may split a batch."""
        experts = None if self.experts == self.heads else self.experts
        return tuple(name for name in (self.data, experts) if name is not None)

    def size(self, mesh: AnyMesh, *names: str | None) -> int:
        """Devices along these axes of the mesh."""
        return math.prod(mesh.shape[name] for name in names if name is not None)

    def check(self, mesh: AnyMesh, config: Config) -> None:
        """Raises ValueError unless the mesh has these axes and no others, and they divide the model evenly."""
        missing = [name for name in self.axes if name not in mesh.axis_names]
        unused = [name for name in mesh.axis_names if name not in self.axes and mesh.shape[name] > 1]
        if missing:
            raise ValueError(f"the layout names mesh axis {missing[0]!r}, and the mesh has {list(mesh.axis_names)}")
        if unused:
            raise ValueError(f"mesh axis {unused[0]!r} splits nothing: name it in the layout")
        for what, count, names in (
            ("experts", config.num_local_experts, self.of_experts),
            ("key heads", config.num_key_value_heads, () if self.heads is None else (self.heads,)),
        ):
            parts = self.size(mesh, *names)
            if count % parts:
                fits = [n for n in range(1, min(count, mesh.size) + 1) if count % n == 0]
                raise ValueError(
                    f"{count} {what} cannot be split evenly over {' x '.join(names)} = {parts} devices; of up to "
                    f"{mesh.size} devices these numbers fit: {', '.join(map(str, fits))}"
                )

    def batch_axes(self, mesh: AnyMesh, batch: int) -> tuple[str, ...]:
        """The axes over which a batch of so many sequences is split: all that may, or fewer where these do not divide.

        What is not split is on every device of the axis, and computed by each.
        """
        everything = self.axes_of_batch
        for names in (everything, everything[:1], everything[1:]):
            if names and batch % self.size(mesh, *names) == 0:
                return names
        return ()

    def layers(self, experts: Experts) -> LayerWeights:
        """The split of every array of all layers' weights, of experts of this form."""
        of_experts = split_along(None, self.of_experts or None)
        return LayerWeights(
            attention_norm=P(),  # type: ignore[arg-type]
            qkv=Linear(split_along(None, self.heads), split_along(None, self.heads)),  # type: ignore[arg-type]
            o=Linear(split_along(None, None, self.heads), P()),  # type: ignore[arg-type]
            sinks=split_along(None, self.heads),  # type: ignore[arg-type]
            moe_norm=P(),  # type: ignore[arg-type]
            router=Linear(P(), P()),  # type: ignore[arg-type]
            experts=jax.tree.map(lambda _: of_experts, experts),
        )

    def lora(self, lora: LoraWeights) -> LoraWeights:
        """The split of every array of adapters on these targets."""
        a: dict[str, Any] = {}
        b: dict[str, Any] = {}
        for name in lora.a:
            if name in EXPERTS:
                a[name] = b[name] = split_along(None, None, self.experts)
            else:
                a[name] = split_along(None, None, None, self.heads) if name == "o" else P()
                b[name] = P() if name == "o" else split_along(None, None, self.heads)
        return LoraWeights(a, b, dict.fromkeys(lora.scale, P()))  # type: ignore[arg-type]

    def of_tensor(self, name: str) -> tuple[str | None, ...]:
        """The axes that split a checkpoint's tensor, by its name in jmoe.checkpoint's view."""
        if ".mlp.experts." in name:
            return self.of_experts
        if ".self_attn." in name and not name.endswith("o_proj.bias"):
            return (self.heads,)
        return ()

    def bytes_of_device(self, mesh: AnyMesh, shapes: Any, specs: Any) -> int:
        """Of arrays of these shapes and splits, what each device has."""
        sizes = jax.tree.map(
            lambda leaf, spec: math.prod(leaf.shape) * leaf.dtype.itemsize // self.size(mesh, *names_of(spec)),
            shapes,
            specs,
        )
        return sum(jax.tree.leaves(sizes))

    def attention_lora(self, lora: AttentionLora) -> AttentionLora:
        """The split of every array of adapters as the layers of all devices apply them."""
        parts: dict[str, Any] = {"a": P(), "scale": P(), "b": split_along(None, None, self.heads)}
        on_qkv = lora.qkv and dataclasses.replace(lora.qkv, **parts)
        parts = {"a": split_along(None, None, None, self.heads), "scale": P(), "b": P()}
        return AttentionLora(on_qkv, lora.o and dataclasses.replace(lora.o, **parts))

    def shardings(self, mesh: Mesh, specs: Any) -> Any:
        """The NamedSharding of each PartitionSpec."""
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def place(self, mesh: Mesh, tree: Any, specs: Any) -> Any:
        """The arrays on the mesh, split by PartitionSpecs: every process has them whole, or they lie so already."""

        def place_one(leaf: Any, spec: P) -> jax.Array:
            sharding = NamedSharding(mesh, spec)
            if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
                return leaf
            if sharding.is_fully_addressable:
                return jax.device_put(leaf, sharding)
            on_host = np.asarray(leaf)
            return jax.make_array_from_callback(on_host.shape, sharding, lambda index: on_host[index])

        return jax.tree.map(place_one, tree, specs)

    def split(self, batch: tuple[str, ...] | None = None) -> Split:
        """What each device has, where these axes split the batch; None: all that may."""
        if batch is None:
            batch = self.axes_of_batch
        return Split(batch, self.experts, self.heads, self.data if self.fsdp else None)


def mesh_and_layout(text: str | None, config: Config, *, fsdp: bool = False) -> tuple[Mesh | None, Layout | None]:
    """What is written after --mesh as jmoe.gpt_oss.load takes it, for a model of this configuration.

    Raises:
      ValueError: as jmoe.device_mesh.make_mesh and Layout.of; fsdp, and no mesh.
    """
    if text is None:
        if fsdp:
            raise ValueError("fsdp splits experts over the data axis of a mesh, and there is none")
        return None, None
    mesh = make_mesh(text)
    return mesh, Layout.of(mesh, config, fsdp=fsdp)


def with_auto_axes(mesh: Mesh) -> Mesh:
    """The mesh with Auto axes, which jax.make_mesh makes Explicit: the model writes out itself where its arrays lie."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def split_along(*entries: str | tuple[str, ...] | None) -> P:
    """A PartitionSpec without the Nones that it may end in: what is split alike has the same one."""
    while entries and not entries[-1]:
        entries = entries[:-1]
    return P(*(entry or None for entry in entries))
