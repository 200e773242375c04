"""Launch parameters: what a table of a GPU holds for each operation. The values are data, in triton_src/tables.

A table has a section for each operation, which is a list of tiles. A tile's first field says up to how much work the
tile is for: the first tile of a section whose bound is not passed is used. A field's metadata says which values
kernels take.
"""

import dataclasses
import math
from typing import Annotated, Any, Self

from jmoe.triton_src.tile_fields import (
    BufferStages,
    ColumnWarps,
    Count,
    OneOf,
    PowerOf2,
    RankBlock,
    Registers,
    Splits,
    Stages,
    Warps,
)

OLDEST = 80
"""The oldest compute capability * 10 that kernels run on."""


@dataclasses.dataclass(frozen=True)
class Bounded:
    """A tile, of which the field named `bound`, its first, says up to how much work it is for."""

    bound = "rows"


@dataclasses.dataclass(frozen=True)
class GroupedMatmulTile(Bounded):
    """grouped_matmul_kernel's parameters, for experts with up to `rows` rows on average."""

    rows: float
    block_m: Annotated[int, PowerOf2(16, 256)]
    block_n: Annotated[int, PowerOf2(16, 256)]
    block_k: Annotated[int, PowerOf2(32, 256)]
    num_warps: Warps
    num_stages: Stages
    shrink_splits: Splits  # parts of K that LoRA's shrink computes side by side


@dataclasses.dataclass(frozen=True)
class DecodeTile(Bounded):
    """packed_decode_kernel's parameters, for experts with up to `rows` rows on average."""

    rows: float
    block_m: Annotated[int, OneOf((8, 16))]
    ahead: Count
    stages: BufferStages  # of tokens in shared memory
    column_warps: ColumnWarps  # of the four, in gate_up's product; the others share these' columns along K
    down_column_warps: ColumnWarps  # in down's product
    tail_tiles: Count  # tiles of down that have other programs: shorter ones, which end the launch sooner
    tail_column_warps: ColumnWarps  # in these, if that is fewer
    max_registers: Registers
    prefetched_experts: Count  # of the first of them routing prefetches weights
    prefetched_blocks: Count  # of 64 along K
    shrink_splits: Splits
    block_r: RankBlock  # LoRA's ranks that a step takes at most


@dataclasses.dataclass(frozen=True)
class GroupedTile(Bounded):
    """packed_grouped_matmul_kernel's parameters, for experts with up to `rows` rows on average."""

    rows: float
    block_m: Annotated[int, OneOf((64, 128))]
    smallest_m: Annotated[int, PowerOf2(16, 128)]
    stages: BufferStages
    ahead: Count
    max_registers: Registers
    shrink_splits: Splits
    block_r: RankBlock  # LoRA's ranks that a step takes at most
    mixed_block_r: RankBlock  # with several adapters
    mixed_max_registers: Registers  # at least, with several adapters: they take a second accumulator


@dataclasses.dataclass(frozen=True)
class PortableDgradTile(Bounded):
    """dgrad_kernel's parameters, for experts with up to `rows` rows on average."""

    rows: float
    block_n: Annotated[int, PowerOf2(16, 256)]  # of the contraction
    block_k: Annotated[int, PowerOf2(32, 256)]  # columns of a program
    num_warps: Warps
    num_stages: Stages


@dataclasses.dataclass(frozen=True)
class DgradTile(Bounded):
    """packed_dgrad_kernel's parameters, for a routing into tiles of up to `block_m` rows."""

    bound = "block_m"
    block_m: Annotated[int, OneOf((64, 128))]
    smallest_m: Annotated[int, PowerOf2(16, 128)]
    stages: BufferStages
    ahead: Count
    max_registers: Registers
    block_r: RankBlock
    mixed_block_r: RankBlock


@dataclasses.dataclass(frozen=True)
class ShrinkTile(Bounded):
    """shrink_kernel's parameters, for experts with up to `rows` rows on average."""

    rows: float
    block_k: Annotated[int, PowerOf2(16, 256)]
    num_warps: Warps
    num_stages: Stages


@dataclasses.dataclass(frozen=True)
class LoraGradTile(Bounded):
    """lora_grad_kernel's parameters, for experts with up to `rows` rows on average."""

    rows: float
    block_m: Annotated[int, PowerOf2(16, 256)]
    block_k: Annotated[int, PowerOf2(16, 256)]
    num_warps: Warps
    num_stages: Stages


@dataclasses.dataclass(frozen=True)
class BiasGradTile(Bounded):
    """bias_grad_kernel's parameters, for experts with up to `rows` rows on average."""

    rows: float
    block_m: Annotated[int, PowerOf2(1, 256)]
    block_n: Annotated[int, PowerOf2(16, 1024)]
    num_warps: Warps
    num_stages: Stages


@dataclasses.dataclass(frozen=True)
class SwigluBackwardTile(Bounded):
    """swiglu_backward_kernel's parameters, for experts with up to `rows` rows on average."""

    rows: float
    block: Annotated[int, PowerOf2(32, 4096)]  # columns that a program has at once
    num_warps: Warps
    num_stages: Stages


@dataclasses.dataclass(frozen=True)
class CombineTile(Bounded):
    """combine_kernel's parameters, for up to `rows` tokens."""

    rows: float
    block_h: Annotated[int, PowerOf2(32, 4096)]
    num_warps: Warps


@dataclasses.dataclass(frozen=True)
class RouteFewTile(Bounded):
    """route_few_kernel's parameters, for up to `elements` rows times columns, both padded to powers of two.

    What passes the last tile's bound is routed in two launches.
    """

    bound = "elements"
    elements: Annotated[int, PowerOf2(256, 65536)]
    block_tiles: Annotated[int, PowerOf2(1, 64)]  # of every expert that are written at once
    block_unused: Annotated[int, PowerOf2(16, 1024)]  # slots past the tiles that are marked as unused at once
    num_warps: Warps


@dataclasses.dataclass(frozen=True)
class CountTile(Bounded):
    """count_kernel's parameters, for up to `columns` experts, padded to a power of two."""

    bound = "columns"
    columns: float
    block_rows: Annotated[int, PowerOf2(4, 256)]  # that a step takes, as far as largest_block allows
    largest_block: Annotated[int, PowerOf2(256, 65536)]  # rows times columns that a step holds in registers
    most_programs: Annotated[
        int, PowerOf2(1, 1024)
    ]  # sort reads every program's counts; past them a program has more rows
    num_warps: Warps


@dataclasses.dataclass(frozen=True)
class SortTile(Bounded):
    """sort_kernel's parameters, for up to `rows` pairs."""

    rows: float
    block_pairs: Annotated[int, PowerOf2(16, 4096)]  # that a program places at once
    block_counts: Annotated[int, PowerOf2(256, 65536)]  # counts that a program reads at once
    block_tiles: Annotated[int, PowerOf2(1, 64)]  # as in RouteFewTile
    block_unused: Annotated[int, PowerOf2(16, 1024)]
    num_warps: Warps


@dataclasses.dataclass(frozen=True)
class SideWorkTile(Bounded):
    """What programs beside those that route take on each, for up to `rows` tokens."""

    rows: float
    reorder_blocks: Annotated[int, PowerOf2(1, 256)]  # blocks of 64 values of the tokens
    prefetch_lines: Annotated[int, PowerOf2(32, 4096)]  # lines of 128 bytes of the weights


@dataclasses.dataclass(frozen=True)
class RouteBackwardTile(Bounded):
    """route_backward_kernel's parameters, for up to `rows` tokens."""

    rows: float
    block_rows: Annotated[int, PowerOf2(1, 256)]  # tokens of a program, as far as largest_block allows
    largest_block: Annotated[int, PowerOf2(256, 65536)]  # tokens times columns
    num_warps: Warps
    num_stages: Stages


@dataclasses.dataclass(frozen=True)
class CachedAttentionTile(Bounded):
    """cached_attention_kernel's and merge_attention_kernel's parameters, for up to `rows` sequences."""

    rows: float
    block_s: Annotated[int, PowerOf2(16, 256)]  # slots of the cache that a program reads at once
    programs: Count  # wanted of a launch: a sequence's slots are split to have so many
    num_warps: Warps
    num_stages: Stages
    merge_num_warps: Warps
    merge_num_stages: Stages


@dataclasses.dataclass(frozen=True)
class PagedDecodeAttentionTile(CachedAttentionTile):
    """The same of paged_decode_attention_kernel; block_s is a page's at most."""


@dataclasses.dataclass(frozen=True)
class PagedPrefillAttentionTile(Bounded):
    """write_pages_kernel's and paged_prefill_attention_kernel's parameters, for up to `rows` tokens."""

    rows: float
    block_m: Annotated[int, PowerOf2(16, 256)]  # queries of a program, times their heads that share a key head
    block_s: Annotated[int, PowerOf2(16, 256)]  # keys that a program reads at once, a page's at most
    num_warps: Warps
    num_stages: Stages
    block_t: Annotated[int, PowerOf2(1, 64)]  # tokens that a program writes
    write_num_warps: Warps


@dataclasses.dataclass(frozen=True)
class DecodeLinearTile(Bounded):
    """decode_linear_kernel's parameters, for up to `rows` rows."""

    rows: float
    block_n: Annotated[int, PowerOf2(1, 256)]
    block_k: Annotated[int, PowerOf2(16, 4096)]
    num_warps: Warps
    num_stages: Stages  # num_stages - 1 blocks are read ahead


@dataclasses.dataclass(frozen=True)
class NormLinearTile(Bounded):
    """norm_linear_kernel's parameters, for up to `rows` rows."""

    rows: float
    block_m: Count  # rows of a program, one after another
    block_n: Annotated[int, PowerOf2(1, 64)]  # columns of the product, held in registers meanwhile
    num_warps: Warps
    num_stages: Stages


@dataclasses.dataclass(frozen=True)
class LoraByRowTile(Bounded):
    """shrink_by_row_kernel's and expand_by_row_kernel's parameters, for up to `rows` rows."""

    rows: float
    block_m: Annotated[int, PowerOf2(16, 256)]  # rows of a program
    block_n: Annotated[int, PowerOf2(16, 256)]  # columns that a program expands
    block_k: Annotated[int, PowerOf2(16, 256)]
    programs: Count  # wanted of a shrink
    most_splits: Count  # programs that share K
    most_lanes: Count  # programs that share the adapters of a program's rows
    num_warps: Warps
    shrink_num_stages: Stages
    expand_num_stages: Stages


@dataclasses.dataclass(frozen=True)
class LaunchTable:
    """The launch parameters of one GPU: of each operation its tiles, by increasing bounds.

    The last tile of a section is for whatever the others are not, but in these: beyond packed_decode's last
    packed_grouped_matmul's are used, beyond route_few's last count's and sort's. Both packed sections and packed_dgrad
    are empty where no kernel reads packed weights.
    """

    grouped_matmul: tuple[GroupedMatmulTile, ...]
    packed_decode: tuple[DecodeTile, ...]
    packed_grouped_matmul: tuple[GroupedTile, ...]
    shrink: tuple[ShrinkTile, ...]
    combine: tuple[CombineTile, ...]
    route_few: tuple[RouteFewTile, ...]
    count: tuple[CountTile, ...]
    count_pairs: tuple[CountTile, ...]  # count, where experts are given: a row for each pair
    sort: tuple[SortTile, ...]
    side_work: tuple[SideWorkTile, ...]
    dgrad: tuple[PortableDgradTile, ...]
    packed_dgrad: tuple[DgradTile, ...]
    swiglu_backward: tuple[SwigluBackwardTile, ...]
    route_backward: tuple[RouteBackwardTile, ...]
    lora_grad: tuple[LoraGradTile, ...]
    bias_grad: tuple[BiasGradTile, ...]
    cached_attention: tuple[CachedAttentionTile, ...]
    decode_linear: tuple[DecodeLinearTile, ...]
    norm_linear: tuple[NormLinearTile, ...]
    paged_decode_attention: tuple[PagedDecodeAttentionTile, ...]
    paged_prefill_attention: tuple[PagedPrefillAttentionTile, ...]
    lora_by_row: tuple[LoraByRowTile, ...]

    def over(self, sections: dict[str, tuple[Any, ...]]) -> Self:
        """This table with these sections in place of its own."""
        return dataclasses.replace(self, **sections)


type LayerTile = GroupedMatmulTile | DecodeTile | GroupedTile


def bound_of(tile: Bounded) -> float:
    """Up to how much work a tile is for."""
    return getattr(tile, tile.bound)


def tile_for[T: Bounded](section: tuple[T, ...], work: float) -> T:
    """The first tile of a section that is for so much work; its last where there is more."""
    for tile in section:
        if work <= getattr(tile, tile.bound):
            return tile
    return section[-1]


def layer_tile(table: LaunchTable, rows: float, *, packed: bool, gradient: bool = False) -> LayerTile | None:
    """The tile that a layer's rows are sorted into, for experts with so many on average: of its products.

    None: a kernel that packed weights take is missing. Few rows of theirs are packed_decode's, and others
    packed_grouped_matmul's. A gradient is packed_grouped_matmul's whatever the rows are, and packed_dgrad's.

    gradient: in the backward pass, or in a forward pass that keeps what one needs.
    """
    if not packed:
        return tile_for(table.grouped_matmul, rows)
    if not gradient and table.packed_decode and rows <= table.packed_decode[-1].rows:
        return tile_for(table.packed_decode, rows)
    if table.packed_grouped_matmul and (table.packed_dgrad or not gradient):
        return tile_for(table.packed_grouped_matmul, rows)
    return None


def reads_packed(kernel: str, table: LaunchTable) -> bool:
    """Whether packed_decode, packed_grouped_matmul or packed_dgrad runs on the table's GPU."""
    return bool(getattr(table, kernel))


def unbounded[T: Bounded](tile: T) -> T:
    """The tile, for any amount of work."""
    return dataclasses.replace(tile, **{tile.bound: math.inf})
