"""Random layers of a given size, for tests, parity and benchmarks."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mxfp4 import BLOCK, Mxfp4

E2M1_RMS = 2.93
"""Root mean square of the sixteen e2m1 values."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """The size of one layer and of one call of it. Defaults are those of gpt-oss-20b, without LoRA."""

    tokens: int
    hidden: int = 2880
    intermediate: int = 2880
    experts: int = 32
    top_k: int = 4
    adapters: int = 0
    rank: int = 0
    mixed: bool = False  # a random adapter, or none, for each token; else adapter 0 for all
    mxfp4: bool = True
    bias: bool = True

    def __str__(self) -> str:
        weights = "" if self.mxfp4 else ", bf16 experts"
        lora = "" if not self.adapters else f", LoRA r={self.rank}" + (f" x{self.adapters} mixed" if self.mixed else "")
        count = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        size = f"{count}, {self.experts} experts, top-{self.top_k}, {self.hidden}/{self.intermediate}"
        return size + weights + lora


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """The array arguments of jmoe.moe."""

    x: jax.Array
    router_logits: jax.Array
    experts: Experts
    lora: Lora | None
    adapter_ids: jax.Array | None


def random_layer(shape: LayerShape, seed: int | jax.Array = 0) -> Layer:
    """Normal activations, logits without ties, weights whose rows have norm about 1, adapters about as strong as these.

    MXFP4 weights are uniform bytes with three scales, so that every code occurs. seed may be a key.
    """
    s = shape
    keys = iter(jax.random.split(jax.random.key(seed) if isinstance(seed, int) else seed, 16))

    def weight(n: int, k: int) -> Mxfp4 | jax.Array:
        if not s.mxfp4:
            return (jax.random.normal(next(keys), (s.experts, n, k)) / math.sqrt(k)).astype(jnp.bfloat16)
        middle = round(127 - math.log2(E2M1_RMS * math.sqrt(k)))
        blocks = jax.random.bits(next(keys), (s.experts, n, k // BLOCK, BLOCK // 2), jnp.uint8)
        scales = jax.random.randint(next(keys), (s.experts, n, k // BLOCK), middle - 1, middle + 2).astype(jnp.uint8)
        return Mxfp4(blocks, scales)

    def bias(n: int) -> jax.Array | None:
        return jax.random.normal(next(keys), (s.experts, n), jnp.bfloat16) if s.bias else None

    def adapter(n: int, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        a = jax.random.normal(next(keys), (s.adapters, s.experts, s.rank, k)) / math.sqrt(k)
        b = jax.random.normal(next(keys), (s.adapters, s.experts, n, s.rank)) / math.sqrt(s.rank)
        return a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), jax.random.uniform(next(keys), (s.adapters,)) + 0.5

    double = 2 * s.intermediate
    experts = Experts(weight(double, s.hidden), bias(double), weight(s.hidden, s.intermediate), bias(s.hidden))
    lora = Lora(*adapter(double, s.hidden), *adapter(s.hidden, s.intermediate)) if s.adapters else None
    x = jax.random.normal(next(keys), (s.tokens, s.hidden), jnp.bfloat16)
    # Distinct eighths, shuffled: exact in bfloat16, so that no two routers disagree about a tie.
    steps = (jnp.arange(s.experts, dtype=jnp.float32) - s.experts / 2) / 8
    logits = jax.random.permutation(next(keys), jnp.tile(steps, (s.tokens, 1)), axis=1, independent=True)
    ids = jax.random.randint(next(keys), (s.tokens,), -1, s.adapters, jnp.int32) if s.mixed else None
    return Layer(x, logits.astype(jnp.bfloat16), experts, lora, ids)
