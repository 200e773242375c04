"""Dropout of the inputs of LoRA on attention, in training.

As PEFT has it on linear modules: LoRA's A sees x with some of its values left out and the others scaled up, each target
a choice of its own, and the product with the weight sees all of x. PEFT has none on the experts' 3-D parameters, and
neither has jmoe, whose kernels multiply one x by weights and by A.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key

from jmoe.gpt_oss.attention_lora import ProductLora
from jmoe.gpt_oss.products import product
from jmoe.gpt_oss.split import WHOLE, Split

STREAM = 0x64726F70
"""Folded into the seed's key, so that no other use of the seed has the same random numbers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraDropout:
    """What is left out: a function of the key alone, so that layers computed again leave out the same; a pytree.

    key: one, or several with a leading axis.
    rate: chance that a value is left out.
    split: which of all sequences are here; what is left out is the same however many devices have them.
    of_heads: whether the columns are heads', of which split has a part too.
    """

    key: Key[Array, "*N"]
    rate: float = dataclasses.field(metadata={"static": True})
    split: Split = dataclasses.field(default=WHOLE, metadata={"static": True})
    of_heads: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, rate: float, seed: int) -> Self | None:
        """Of this rate; None for 0, with which nothing is left out."""
        return cls(jax.random.fold_in(jax.random.key(seed), STREAM), rate) if rate else None

    def number(self, index: Int32[Array, ""] | int) -> Self:
        """One of many that are independent."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, index))

    def numbers(self, count: int) -> Self:
        """The first of them, with a leading axis."""
        return dataclasses.replace(self, key=jax.vmap(lambda i: jax.random.fold_in(self.key, i))(jnp.arange(count)))

    def kept(self, shape: tuple[int, ...]) -> Bool[Array, "B T K"]:
        """Which of this device's inputs of that shape are not left out."""
        batch, length, columns = shape
        batch, first = self.split.whole_batch(batch)
        columns, first_column = self.split.whole_columns(columns) if self.of_heads else (columns, 0)
        whole = jax.random.bernoulli(self.key, 1 - self.rate, (batch, length, columns))
        return whole if whole.shape == shape else lax.dynamic_slice(whole, (first, 0, first_column), shape)


def shrink_dropped(x: Float[Array, "B T K"], lora: ProductLora, dropout: LoraDropout) -> Float[Array, "B T R"]:
    """LoRA's first half, (dropout(x) A^T) * scale for one adapter, rounded to x's dtype."""
    parts, before = [], 0
    for number, rank in enumerate(lora.ranks):
        own = slice(before, before + rank)
        kept = dropout.number(number).kept(x.shape)
        seen = jnp.where(kept, x / (1 - dropout.rate), 0).astype(x.dtype)
        parts.append(product("btk,rk->btr", seen, lora.a[0, own]) * lora.scale[0, own])
        before += rank
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
