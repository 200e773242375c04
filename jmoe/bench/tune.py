"""Measures tiles on the GPU at hand: which of the candidates is best at each of a few numbers of tokens."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jmoe.bench.case import Case, Size, calls_for
from jmoe.bench.jax_timing import scan_timer, unrolled
from jmoe.bench.run import attempt
from jmoe.bench.weights import Weights, random_input
from jmoe.ops.buffers import Options, name_buffers
from jmoe.ops.experts import Experts
from jmoe.ops.launch.layer import launch_layer
from jmoe.ops.launch.local_gpu import local_capability
from jmoe.triton_src.activation import SwiGLU

if TYPE_CHECKING:
    from jmoe.triton_src.tiles import TileTables

TABLES = ("portable", "packed")

TOKENS = (1, 4, 16, 64, 128, 256, 1024, 4096)
EXPERTS = 32

NOISE = 0.02
"""What two runs of the same tile differ by; the package's own tile stays unless another is faster by more."""

TOLERANCE = 2e-2
"""Relative difference from the package's own tile beyond which a result counts as wrong."""

type Timer = Callable[[jax.Array | None], tuple[float, jax.Array]]
"""(microseconds of a layer, its result) of the wanted result, if there is one; ValueError if its own is another."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best tile of a table at some number of tokens; times in microseconds a layer, routing included."""

    table: str  # one of TABLES
    tokens: int
    rows: float  # that an expert gets on average
    tile: Any
    microseconds: float
    built_in: Any
    built_in_microseconds: float | str
    tried: int
    failed: int

    def __str__(self) -> str:
        own = self.built_in_microseconds
        before = own if isinstance(own, str) else f"{own:.1f}"
        fields = {name: value for name, value in dataclasses.asdict(self.tile).items() if name != "rows"}
        tile = ", ".join(f"{name}={value}" for name, value in fields.items())
        return (
            f"{self.table}, {self.tokens} tokens: {type(self.tile).__name__}({tile}) {self.microseconds:.1f} us, "
            f"built in {before}; {self.tried} tried, {self.failed} failed"
        )


def tune(tokens: Sequence[int]) -> Iterator[Choice]:
    """The best tile at each of these numbers of tokens, table by table, by increasing rows an expert.

    The whole layer is timed, as the routing and the sum also depend on a product's tiles.

    Raises:
      NotImplementedError: there is no GPU, or it is older than the kernels support.
      RuntimeError: no tile runs.
    """
    from jmoe.triton_src.tile_tables import built_in

    capability = local_capability()
    own = built_in(capability)
    weights = Weights(Size(), EXPERTS)
    for table in TABLES:
        entries = getattr(own, table)
        for count in distinct(tokens) if entries else []:
            start = next(tile for tile in entries if average_rows(count) <= tile.rows)
            experts = weights.packed if table == "packed" else weights.experts
            yield best_of(table, count, start, entries, experts, capability)


def average_rows(tokens: int) -> float:
    """Rows that an expert gets on average, which tiles are chosen by."""
    return tokens * Size().top_k / EXPERTS


def distinct(tokens: Sequence[int]) -> list[int]:
    """The numbers of tokens, increasing, the largest alone of those that give an expert as many rows."""
    return list({average_rows(count): count for count in sorted(tokens)}.values())


def best_of(table: str, tokens: int, start: Any, entries: Sequence[Any], experts: Experts, capability: int) -> Choice:
    """Times all candidates at one number of tokens, one after another; compiled they are side by side."""
    from jmoe.triton_src.tile_tables import candidates

    tiles = candidates(entries, start)
    x, logits = random_input(Case(EXPERTS, tokens), Size(), unrolled())
    prepare = functools.partial(prepare_tile, table, x, logits, experts, capability)
    with ThreadPoolExecutor() as threads:
        prepared = list(threads.map(lambda tile: attempt(functools.partial(prepare, tile)), tiles))
    wanted: jax.Array | None = None
    times: dict[Any, float | str] = {}
    for tile, timer in zip(tiles, prepared, strict=True):
        outcome = timer if isinstance(timer, str) else attempt(functools.partial(timer, wanted))
        if isinstance(outcome, str):
            times[tile] = outcome
            continue
        times[tile], result = outcome
        wanted = result if wanted is None else wanted
    return choose_best(table, tokens, times)


def choose_best(table: str, tokens: int, times: dict[Any, float | str]) -> Choice:
    """The fastest of the tiles that ran; the first is the package's own and wins what is within noise."""
    ran = {tile: time for tile, time in times.items() if not isinstance(time, str)}
    own = next(iter(times))
    if not ran:
        raise RuntimeError(f"no {table} tile runs with {tokens} tokens; the first one: {times[own]}")
    best = min(ran, key=lambda tile: ran[tile])
    if own in ran and ran[best] > (1 - NOISE) * ran[own]:
        best = own
    failed = len(times) - len(ran)
    return Choice(table, tokens, average_rows(tokens), best, ran[best], own, times[own], len(times), failed)


def prepare_tile(table: str, x: jax.Array, logits: jax.Array, experts: Experts, capability: int, tile: Any) -> Timer:
    """The layer with this tile, compiled."""
    size = Size()
    tables = single(table, tile)

    def step(x: jax.Array, logits: jax.Array, experts: Experts) -> jax.Array:
        options = Options(size.intermediate, size.top_k, SwiGLU(), capability, forced=True, recompute=False)
        buffers = name_buffers(x, logits, experts, None, None, None, 0, None)
        return launch_layer(buffers, options, capability, tables)["y"]

    once = jax.jit(step).lower(x, logits[0], experts).compile()
    microseconds = scan_timer(step, x, logits, experts, calls_for(x.shape[0]))

    def timer(wanted: jax.Array | None) -> tuple[float, jax.Array]:
        result = once(x, logits[0], experts)
        if wanted is not None and not relative_difference(result, wanted) <= TOLERANCE:
            raise ValueError("a wrong result")
        return microseconds(), result

    return timer


def single(table: str, tile: Any) -> "TileTables":
    """Tables with this one tile."""
    from jmoe.triton_src.tile_tables import TileTables

    return TileTables(**{**dict.fromkeys(TABLES, ()), table: (tile,)})


def relative_difference(a: jax.Array, b: jax.Array) -> float:
    """|a - b| / |b|, NaN if there is any."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def tables_of(choices: Sequence[Choice]) -> "TileTables":
    """The tables that these choices make."""
    from jmoe.triton_src.tile_tables import TileTables, assemble

    best = {table: [(choice.rows, choice.tile) for choice in choices if choice.table == table] for table in TABLES}
    return TileTables(**{table: assemble(tiles) for table, tiles in best.items()})
