"""LoRA on attention as the layers apply it: q, k and v together, since their weights lie in one array."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.weights import LoraWeights, qkv_rows, sizes, take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProductLora:
    """A adapters on one product, of all layers or without the leading axis of one; a pytree.

    a: [L, A, r, K]; scale: float32 [L, A, r]; b: [L, A, N, r]; r counts the ranks of all targets.
    ranks: of the targets, one after another.
    """

    a: Float[Array, "... A R K"]
    scale: Float[Array, "... A R"]
    b: Float[Array, "... A N R"]
    ranks: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionLora:
    """On the product of q, k and v, and on that of o; None without; a pytree."""

    qkv: ProductLora | None
    o: ProductLora | None

    @classmethod
    def of(cls, lora: LoraWeights | None, config: Config, dtype: DTypeLike, parts: int = 1) -> Self | None:
        """The adapters' part on attention, in the dtype of activations.

        parts: in which a mesh splits heads, and so the rows of q, k and v.
        """
        if lora is None:
            return None
        qkv, o = (join(lora, names, config, dtype) for names in (("q", "k", "v"), ("o",)))
        if qkv is not None and parts > 1:
            qkv = dataclasses.replace(qkv, b=qkv.b[:, :, qkv_rows(config, parts)])
        return cls(qkv, o)

    @property
    def of_all_layers(self) -> bool:
        """Whether it has the leading axis for layers."""
        return any(leaf.ndim == 4 for leaf in jax.tree.leaves(self.qkv or self.o))

    def layer(self, index: Int32[Array, ""] | int) -> Self:
        """One layer's."""
        return jax.tree.map(functools.partial(take, index=index), self)


def join(lora: LoraWeights, names: tuple[str, ...], config: Config, dtype: DTypeLike) -> ProductLora | None:
    """The targets' factors as those of one product whose rows follow each other: ranks side by side, B in blocks."""
    if not any(name in lora.a for name in names):
        return None
    a, scale, columns = [], [], []
    before, whole = 0, sum(sizes(config)[name][0] for name in names)
    for name in names:
        n = sizes(config)[name][0]
        if name in lora.a:
            a.append(lora.a[name])
            scale.append(jnp.broadcast_to(lora.scale[name][..., None], lora.a[name].shape[:-1]))
            columns.append(jnp.pad(lora.b[name], [(0, 0), (0, 0), (before, whole - before - n), (0, 0)]))
        before += n
    joined = [jnp.concatenate(parts, axis=axis) for parts, axis in ((a, 2), (scale, 2), (columns, 3))]
    ranks = tuple(part.shape[2] for part in a)
    return ProductLora(joined[0].astype(dtype), joined[1], joined[2].astype(dtype), ranks)
