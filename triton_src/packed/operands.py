"""What the programs of one launch over packed experts share: which rows there are, and the operands of its products."""

from typing import TypeAlias

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

OptionalPointer: TypeAlias = gl.tensor | gl.constexpr  # noqa: UP040 (checked when kernels are compiled)
"""A pointer, or None."""


@gluon.aggregate
class Rows:
    """The rows of all experts, in tiles."""

    order_ptr: gl.tensor  # (P,) int32, position -> pair
    tiles_ptr: gl.tensor  # (max_tiles, 3) int32: expert or -1, first position, end position
    ready_counters_ptr: OptionalPointer  # (max_tiles + 1,) int32: see ready_counters
    adapter_ids_ptr: OptionalPointer  # (T,) int32, -1 for none; None: adapter 0 for all
    pairs: gl.tensor
    EXPERTS: gl.constexpr
    TOP_K: gl.constexpr
    ADAPTERS: gl.constexpr
    BLOCK_M: gl.constexpr


@gluon.aggregate
class Lora:
    """LoRA of one product; None and rank 0 without."""

    a_ptr: OptionalPointer  # (A, E, R, K) bf16 or float32
    b_ptr: OptionalPointer  # (A, E, N, R) bf16 or float32
    scale_ptr: OptionalPointer  # (A,) float32
    layer_ptr: OptionalPointer  # (1,) int32: which layer's LoRA, of several; None: there is one layer's
    shrunk_ptr: OptionalPointer  # (SPLITS, P, RANK_PADDED) float32 by position
    RANK: gl.constexpr
    RANK_PADDED: gl.constexpr  # of a shrunk row
    BLOCK_R: gl.constexpr
    SPLITS: gl.constexpr


@gluon.aggregate
class Product:
    """gate_up or down."""

    x_ptr: gl.tensor  # bf16, by token for gate_up and by position for down; (., K), or (., K padded) in mma K order
    words_ptr: gl.tensor  # (E, N / 64, K / 64, 512) int32
    scales_ptr: gl.tensor  # (E, N / 64, K / 64, 32) int32
    bias_ptr: OptionalPointer  # (E, N) bf16 or float32
    layer_ptr: OptionalPointer  # (1,) int32: which layer's weights, of several; None: there is one layer's
    gates_ptr: OptionalPointer  # (P,) float32, routing weight by pair: down's
    out_ptr: gl.tensor  # (P, OUT_WIDTH) bf16: by position for gate_up, in x's order, and by pair for down
    lora: Lora
    N: gl.constexpr
    K: gl.constexpr
    OUT_WIDTH: gl.constexpr
    GATE_UP: gl.constexpr
    ACTIVATION: gl.constexpr  # jmoe.triton_src.activation.SwiGLU: what follows gate_up
    AHEAD: gl.constexpr  # blocks of weights in flight
    STAGES: gl.constexpr  # of tokens in shared memory
    X_READY: gl.constexpr  # what a tile's counter is at when x can be read, and when what is shrunk can
    SHRUNK_READY: gl.constexpr


@gluon.aggregate
class Tile:
    """Rows of one expert."""

    expert: gl.tensor
    first: gl.tensor  # position
    end: gl.tensor
    counter: OptionalPointer  # of Rows.ready_counters_ptr
    signals: gl.tensor | gl.constexpr  # by each program that has written: 1, or 0 if it does others' work
