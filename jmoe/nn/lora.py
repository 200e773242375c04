"""LoRA adapters for new layers: how they are asked for, and how they begin."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jmoe.ops.check import as_count
from jmoe.ops.experts import Lora

PROJECTIONS = ("gate_up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """New adapters on a layer's experts.

    rank: r.
    alpha: positive; the delta is scaled by alpha / r, or alpha / sqrt(r) if rank_stabilized (arXiv 2312.03732). None:
      as much as the rank, so that plain LoRA is not scaled.
    targets: which products have LoRA, a name or several: "gate_up", "down", or PEFT's names of their parameters, as
      "mlp.experts.gate_up_proj".
    adapters: how many stand side by side, for batches that mix them.
    dtype: of A and B. Their products run in x's dtype.

    Raises:
      ValueError: a target is not one of the experts' tensors, or there are none; the rank or adapters are below 1; or
        alpha is not positive and finite: at 0 no gradient would reach A and B.
    """

    rank: int
    alpha: float | None = None
    rank_stabilized: bool = False
    targets: str | Sequence[str] = PROJECTIONS
    adapters: int = 1
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        for name in ("rank", "adapters"):
            as_count(name, getattr(self, name))
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        if not self.targets:
            raise ValueError("targets must name one of the experts' tensors, got none: LoRA would train nothing")
        _ = self.projections  # refuses names of no expert tensor

    @property
    def projections(self) -> tuple[str, ...]:
        """The targets by this package's names, each once."""
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        return tuple(dict.fromkeys(projection_of(target) for target in targets))

    @property
    def scale(self) -> float:
        """What multiplies B A."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def projection_of(target: str) -> str:
    """ "gate_up" or "down" for a target's name.

    Raises:
      ValueError: it names neither, or a tensor of a module that is not `experts`.
    """
    *modules, tensor = target.removesuffix(".weight").split(".")
    name = tensor.removesuffix("_proj")
    if name not in PROJECTIONS or (modules and modules[-1] != "experts"):
        raise ValueError(
            f'LoRA targets must match an expert tensor ("gate_up", "down", "mlp.experts.gate_up_proj" or '
            f'"mlp.experts.down_proj"), got {target!r}'
        )
    return name


def new_lora(config: LoraConfig, *, hidden: int, intermediate: int, experts: int, rngs: nnx.Rngs) -> Lora:
    """Adapters that change nothing yet: A uniform in ±1 / sqrt(its inputs), B zero, as PEFT begins."""
    parts = {}
    for projection in config.projections:
        n, k = (2 * intermediate, hidden) if projection == "gate_up" else (hidden, intermediate)
        shape = (config.adapters, experts, config.rank, k)
        bound = 1 / math.sqrt(k)
        parts[f"{projection}_a"] = jax.random.uniform(rngs.params(), shape, config.dtype, -bound, bound)
        parts[f"{projection}_b"] = jnp.zeros((config.adapters, experts, n, config.rank), config.dtype)
        parts[f"{projection}_scale"] = jnp.full(config.adapters, config.scale, jnp.float32)
    return Lora(**parts)
