"""Room for a fixed number of adapters of one size on the device, filled and emptied while programs run."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Int32

from jmoe.gpt_oss.attention_lora import AttentionLora
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.weights import EXPERTS, LoraWeights, sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterPlaces:
    """Adapters as the layers read them; a pytree whose arrays begin with [layers, places].

    experts: what is on experts; its `scale` has entries also where it has no factors, which say how many places there
      are.
    """

    attention: AttentionLora | None
    experts: LoraWeights

    @classmethod
    def of(cls, weights: LoraWeights, config: Config, dtype: DTypeLike, parts: int = 1) -> Self:
        """Adapters laid out, in the dtype of activations; parts: in which a mesh splits heads."""
        names = [name for name in EXPERTS if name in weights.a]
        a, b = ({name: part[name].astype(dtype) for name in names} for part in (weights.a, weights.b))
        scale = {name: weights.scale[name] for name in names or list(weights.scale)[:1]}
        return cls(AttentionLora.of(weights, config, dtype, parts), LoraWeights(a, b, scale))

    @classmethod
    def empty(cls, config: Config, targets: Sequence[str], places: int, rank: int, dtype: DTypeLike) -> Self:
        """Room for so many adapters of ranks up to this one: zeros, which change nothing."""
        one = next(padded_layers(None, config, targets, rank, dtype))
        shapes = jax.eval_shape(lambda weights: cls.of(weights, config, dtype), one)
        layers = config.num_hidden_layers
        return jax.tree.map(lambda leaf: jnp.zeros((layers, places, *leaf.shape[2:]), leaf.dtype), shapes)

    def put(
        self,
        weights: LoraWeights,
        layer: Int32[Array, ""],
        place: Int32[Array, ""],
        config: Config,
        dtype: DTypeLike,
        parts: int = 1,
    ) -> Self:
        """With one layer of one adapter, as padded_layers gives it, in a place."""

        def put_one(room: Array, part: Array) -> Array:
            return lax.dynamic_update_slice(room, part, (layer, place, *(0,) * (room.ndim - 2)))

        return jax.tree.map(put_one, self, type(self).of(weights, config, dtype, parts))


def check_adapter(weights: LoraWeights, config: Config, targets: Sequence[str], rank: int) -> None:
    """Raises ValueError unless the weights are of one adapter that fits a place."""
    if not weights.a:
        raise ValueError("the adapter has LoRA on nothing")
    if wrong := sorted(set(weights.a) - set(targets)):
        raise ValueError(f"the adapter has LoRA on {', '.join(wrong)}, and the places are for {', '.join(targets)}")
    for target, a in weights.a.items():
        n, k = sizes(config)[target]
        experts = (config.num_local_experts,) if target in EXPERTS else ()
        own = a.shape[-2]
        wanted = (config.num_hidden_layers, 1, *experts)
        if a.shape != (*wanted, own, k) or weights.b[target].shape != (*wanted, n, own):
            raise ValueError(
                f"LoRA on {target} must be of one adapter for this model, A {(*wanted, 'r', k)} and B "
                f"{(*wanted, n, 'r')}, got {a.shape} and {weights.b[target].shape}"
            )
        if own > rank:
            raise ValueError(f"the adapter's rank on {target} must be at most max_lora_rank = {rank}, got {own}")


def padded_layers(
    weights: LoraWeights | None, config: Config, targets: Sequence[str], rank: int, dtype: DTypeLike
) -> Iterator[LoraWeights]:
    """Each layer of an adapter, with axes of 1 for layers and adapters: ranks padded with zeros, and zeros on targets
    that it leaves alone; None: of no adapter.

    On the host, where nothing is compiled for the shapes of an adapter.
    """
    weights = jax.tree.map(np.asarray, weights)
    for layer in range(config.num_hidden_layers):
        a, b, scale = {}, {}, {}
        for target in targets:
            n, k = sizes(config)[target]
            experts = (config.num_local_experts,) if target in EXPERTS else ()
            a[target] = np.zeros((1, 1, *experts, rank, k), dtype)
            b[target] = np.zeros((1, 1, *experts, n, rank), dtype)
            scale[target] = np.zeros((1, 1), np.float32)
            if weights is not None and target in weights.a:
                own = weights.a[target].shape[-2]
                a[target][0, 0, ..., :own, :] = weights.a[target][layer, 0]
                b[target][0, 0, ..., :own] = weights.b[target][layer, 0]
                scale[target][0, 0] = weights.scale[target][layer, 0]
        yield LoraWeights(a, b, scale)  # type: ignore[arg-type]
