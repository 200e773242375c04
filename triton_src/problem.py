"""What a layer's launches depend on, apart from the GPU."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Protocol, Self

from jmoe.triton_src.activation import SwiGLU
from jmoe.triton_src.routing.l2_prefetch import Prefetch
from jmoe.triton_src.routing.problem import RouteProblem, first_wave_tiles, max_tiles
from jmoe.triton_src.scoring import Scoring
from jmoe.triton_src.stacked import ONE_LAYER, Stacked


class Layout(enum.Enum):
    """How an expert's weight [N, K] lies in memory."""

    DENSE = "bfloat16"
    MXFP4 = "MXFP4 in the order of checkpoints"
    PACKED = "MXFP4 in the order of Hopper's tensor cores"

    def bytes(self, n: int, k: int) -> int:
        """Of one expert's weight, without padding; MXFP4 has half a byte a value and one byte for 32 values."""
        return 2 * n * k if self is Layout.DENSE else n * k * 17 // 32


class RowTile(Protocol):
    """A tile that rows of one expert are sorted into: of a grouped product, and of LoRA's shrink beside it."""

    @property
    def block_m(self) -> int: ...
    @property
    def shrink_splits(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Projection:
    """One of the experts' two products: [., n] from [., k] by weights [E, n, k]."""

    name: str  # "gate_up" or "down": its buffers' names begin so
    n: int
    k: int
    layout: Layout
    bias: bool
    rank: int | None  # LoRA's; None without

    @property
    def is_gate_up(self) -> bool:
        return self.name == "gate_up"


@dataclasses.dataclass(frozen=True)
class MoeProblem:
    """One layer's call. Hashable."""

    tokens: int  # at least 1
    top_k: int
    experts: int  # of this shard
    router_experts: int | None  # columns of the router's logits; None: experts and weights are given
    gate_up: Projection
    down: Projection
    activation: SwiGLU
    adapters: int = 0  # 0 without LoRA
    adapter_ids: bool = False
    expert_offset: bool = False
    stacked: Stacked = ONE_LAYER
    scoring: Scoring = Scoring()
    choice_bias: bool = False
    hidden: int = dataclasses.field(init=False)
    intermediate: int = dataclasses.field(init=False)
    pairs: int = dataclasses.field(init=False)  # of a token and one of its experts
    active_experts: int = dataclasses.field(init=False)  # the most that have rows
    rows_of_expert: float = dataclasses.field(init=False)  # on average, which most tiles are chosen by
    packed: bool = dataclasses.field(init=False)  # both weights are, so that kernels for packed weights are asked for

    def __post_init__(self) -> None:
        pairs = self.tokens * self.top_k
        vars(self).update(
            hidden=self.gate_up.k,
            intermediate=self.down.k,
            pairs=pairs,
            active_experts=min(pairs, self.experts),
            rows_of_expert=pairs / self.experts,
            packed=self.gate_up.layout is self.down.layout is Layout.PACKED,
        )

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        intermediate: int,
        layouts: Mapping[str, Layout],
        top_k: int,
        activation: SwiGLU,
        scoring: Scoring = Scoring(),
    ) -> Self:
        """The problem posed by buffers of these names and shapes, and weights of these layouts by projection.

        x [T, H]; router_logits [T, E], with choice_bias [E] or not, or experts and weights [T, k]; gate_up and down,
        with gate_up_scales and down_scales if they are MXFP4; gate_up_bias, down_bias, gate_up_a, gate_up_b,
        gate_up_scale, down_a, down_b, down_scale, adapter_ids and expert_offset where there are any. Packed weights
        hide I, so it is named. With layer [1] weights and biases, and LoRA or not, have a leading axis for layers.
        """
        tokens, hidden = shapes["x"]
        stacked = Stacked("layer" in shapes, any(len(shapes.get(name, ())) == 5 for name in ("gate_up_a", "down_a")))
        scale = shapes.get("gate_up_scale", shapes.get("down_scale"))
        gate_up, down = (
            Projection(
                name=name,
                n=n,
                k=k,
                layout=layouts[name],
                bias=f"{name}_bias" in shapes,
                rank=shapes[f"{name}_a"][-2] if f"{name}_a" in shapes else None,
            )
            for name, n, k in (("gate_up", 2 * intermediate, hidden), ("down", hidden, intermediate))
        )
        return cls(
            tokens=tokens,
            top_k=top_k,
            experts=shapes["gate_up"][1 if stacked.weights else 0],
            router_experts=shapes["router_logits"][1] if "router_logits" in shapes else None,
            gate_up=gate_up,
            down=down,
            activation=activation,
            adapters=0 if scale is None else scale[-1],
            adapter_ids="adapter_ids" in shapes,
            expert_offset="expert_offset" in shapes,
            stacked=stacked,
            scoring=scoring,
            choice_bias="choice_bias" in shapes,
        )

    def max_tiles(self, tile: RowTile) -> int:
        """The most tiles that the rows can need."""
        return max_tiles(self.pairs, self.experts, tile.block_m)

    def first_wave_tiles(self, tile: RowTile) -> int:
        """Tiles that have programs of their own."""
        return first_wave_tiles(self.pairs, self.experts, tile.block_m)

    def routing(
        self,
        tile: RowTile,
        *,
        replay: bool = False,
        reorder: bool = False,
        counters: bool = False,
        prefetch: Prefetch | None = None,
    ) -> RouteProblem:
        """The layer's routing into tiles, which `replay` takes from experts and weights as a forward pass wrote them.

        See RouteProblem for what goes beside it.
        """
        return RouteProblem(
            tokens=self.tokens,
            top_k=self.top_k,
            experts=self.experts,
            router_experts=None if replay else self.router_experts,
            expert_offset=self.expert_offset,
            block_m=tile.block_m,
            hidden=self.hidden if reorder else None,
            counters=counters,
            prefetch=prefetch,
            scoring=self.scoring,
            choice_bias=self.choice_bias,
        )
