"""Measures launch parameters on the GPU at hand: which of the candidates are best at each of a few numbers of tokens.

One section of the table after another is tried, on the work that runs by it, with the best of the sections before.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jmoe.bench.case import calls_for
from jmoe.bench.jax_timing import scan_timer
from jmoe.bench.run import attempt
from jmoe.bench.tuned_work import Sizes, Work, Works
from jmoe.ops.decode.linear import MOST_ROWS
from jmoe.ops.launch.local_gpu import Trial

if TYPE_CHECKING:
    from jmoe.triton_src.tiles import LaunchTable

TOKENS = (1, 4, 16, 64, 128, 256, 1024, 4096)

PARTS = ("forward", "lora", "gradient", "decode", "prefill")

NOISE = 0.02
"""What two runs of the same tile differ by; the parameters at hand stay unless others are faster by more."""

TOLERANCE = 2e-2
"""Relative difference from the result with the parameters at hand beyond which a result counts as wrong."""


FAR = 4
"""Beyond so many times the rows that packed_decode is for it is not tried: there a call takes long."""


class Step(NamedTuple):
    """One section to tune, on some work.

    part: one of PARTS.
    packed: on packed experts or a checkpoint's; None: on packed ones where kernels read them.
    fields: those to vary; all if there are none.
    """

    part: str
    section: str
    work: str
    packed: bool | None = None
    fields: tuple[str, ...] = ()


LORA = ("shrink_splits", "block_r")

STEPS = (
    Step("forward", "grouped_matmul", "forward", False),
    Step("forward", "packed_decode", "forward", True),
    Step("forward", "packed_grouped_matmul", "forward", True),
    *(Step("forward", section, "forward") for section in ("route_few", "count", "sort", "side_work", "combine")),
    Step("lora", "grouped_matmul", "lora", False, LORA[:1]),
    Step("lora", "packed_decode", "lora", True, LORA),
    Step("lora", "packed_grouped_matmul", "lora", True, LORA),
    Step("lora", "shrink", "lora"),
    Step("gradient", "dgrad", "gradient", False),
    Step("gradient", "packed_dgrad", "gradient", True),
    *(
        Step("gradient", section, "gradient")
        for section in ("swiglu_backward", "route_backward", "count_pairs", "lora_grad", "bias_grad")
    ),
    *(
        Step("decode", name, name)
        for name in ("decode_linear", "norm_linear", "cached_attention", "paged_decode_attention")
    ),
    *(Step("prefill", name, name) for name in ("paged_prefill_attention", "lora_by_row")),
)

PER_EXPERT = (
    "grouped_matmul", "packed_decode", "packed_grouped_matmul", "shrink", "dgrad", "swiglu_backward", "lora_grad",
    "bias_grad",
)  # fmt: skip
"""Sections whose rows are those of an expert on average; sort's are pairs and the others' tokens."""


class Timer(NamedTuple):
    """A work with some table, compiled.

    program: its text; of two tables with the same one no parameter differs that matters.
    run: (microseconds of a call, results) of the results wanted, if there are any; ValueError if its own differ.
    """

    program: str
    run: Callable[[Any], tuple[float, Any]]


type Prepare = Callable[[Work, "LaunchTable"], Timer]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best content of a section at some number of tokens; microseconds of a call of the step's work."""

    section: str
    work: str
    tokens: int
    rows: float
    tiles: tuple[Any, ...]
    microseconds: float
    before: tuple[Any, ...]
    microseconds_before: float | str
    tried: int
    failed: int

    def __str__(self) -> str:
        own = self.microseconds_before
        before = own if isinstance(own, str) else f"{own:.1f}"
        changed = [tile for tile in self.tiles if tile not in self.before]
        shown = ", ".join(map(str, changed)) or "as before"
        return (
            f"{self.section} by {self.work}, {self.tokens} tokens: {shown}; {self.microseconds:.1f} us, "
            f"before {before}; {self.tried} tried, {self.failed} failed"
        )


def tune(
    tokens: Sequence[int], sizes: Sizes, parts: Sequence[str], table: "LaunchTable", prepare: Prepare
) -> Iterator[Choice]:
    """The best content of each section at each number of tokens, increasing, beginning with those of `table`.

    Steps whose parameters change nothing at that number of tokens are left out.

    Raises:
      RuntimeError: no candidate runs.
    """
    from jmoe.triton_src.tile_candidates import ROWS, candidates, forced
    from jmoe.triton_src.tile_tables import KINDS

    works = Works(sizes)
    decode_microseconds = math.inf
    for count in sorted(set(tokens)):
        at_hand = table
        for step in STEPS:
            tiles = getattr(at_hand, step.section)
            rows = rows_of(step.section, count, sizes)
            if step.section == "packed_decode" and tiles and rows > FAR * tiles[-1].rows:
                at_hand, tiles = at_hand.over({"packed_decode": ()}), ()
            if step.part not in parts or not tiles or (step.part == "decode" and count > MOST_ROWS):
                continue
            packed = bool(table.packed_grouped_matmul) if step.packed is None else step.packed
            tried = candidates(step.section, tiles, rows, step.fields)
            tables = [forced(at_hand, step.section, tiles) for tiles in tried]
            work = works.of(step.work, count, packed=packed)
            choice = best_of(step, count, rows, tried, tables, functools.partial(prepare, work))
            if choice is None:
                continue
            yield choice
            if step.section == "packed_grouped_matmul" and choice.microseconds < decode_microseconds:
                # What follows is measured on the kernel that this number of tokens will have.
                at_hand = at_hand.over({"packed_decode": ()})
            decode_microseconds = choice.microseconds if step.section == "packed_decode" else math.inf
            at_hand = at_hand.over({step.section: choice.tiles})
        table = table.over({name: getattr(at_hand, name) for name in KINDS if name not in ROWS})


def rows_of(section: str, tokens: int, sizes: Sizes) -> float:
    """What the tiles of a section by rows are chosen by."""
    if section in PER_EXPERT:
        return tokens * sizes.top_k / sizes.experts
    return tokens * (sizes.top_k if section == "sort" else 1)


def best_of(
    step: Step,
    tokens: int,
    rows: float,
    tried: Sequence[tuple[Any, ...]],
    tables: Sequence["LaunchTable"],
    prepare: Callable[["LaunchTable"], Timer],
) -> Choice | None:
    """Times all candidates, one after another; they are compiled side by side. None if all make one program."""
    with ThreadPoolExecutor() as threads:
        prepared = list(threads.map(lambda table: attempt(functools.partial(prepare, table)), tables))
    compiled = [timer for timer in prepared if isinstance(timer, Timer)]
    if len(compiled) == len(prepared) and len({timer.program for timer in compiled}) == 1:
        return None
    wanted: Any = None
    programs = set()
    times: dict[tuple[Any, ...], float | str] = {}
    for tiles, timer in zip(tried, prepared, strict=True):
        if isinstance(timer, str):
            times[tiles] = timer
        elif timer.program not in programs:
            programs.add(timer.program)
            outcome = attempt(functools.partial(timer.run, wanted))
            times[tiles] = outcome if isinstance(outcome, str) else outcome[0]
            if not isinstance(outcome, str) and wanted is None:
                wanted = outcome[1]
    return choose_best(step, tokens, rows, times)


def choose_best(step: Step, tokens: int, rows: float, times: dict[tuple[Any, ...], float | str]) -> Choice:
    """The fastest of the candidates that ran; the first is what was at hand and wins what is within noise."""
    ran = {tiles: time for tiles, time in times.items() if not isinstance(time, str)}
    own = next(iter(times))
    if not ran:
        raise RuntimeError(f"no {step.section} tile runs {step.work} of {tokens} tokens; the first one: {times[own]}")
    best = min(ran, key=lambda tiles: ran[tiles])
    if own in ran and ran[best] > (1 - NOISE) * ran[own]:
        best = own
    failed = len(times) - len(ran)
    return Choice(
        step.section, step.work, tokens, rows, best, ran[best], own, times[own], tried=len(times), failed=failed
    )


def prepare_on_gpu(capability: int, work: Work, table: "LaunchTable") -> Timer:
    """The work with this table, compiled for the GPU at hand, which has this compute capability."""
    target = Trial(f"sm_{capability}", table=table)

    def call(carry: Any, draw: jax.Array, arrays: Any) -> Any:
        return work.call(target, carry, draw, arrays)

    def step(carry: Any, draw: jax.Array, arrays: Any) -> Any:
        return work.carry(carry, call(carry, draw, arrays))

    lowered = jax.jit(call).lower(work.start, work.draws[0], work.arrays)
    once = lowered.compile()
    tokens = jax.tree.leaves(work.start)[0].shape[0]
    microseconds = scan_timer(step, work.start, work.draws, work.arrays, calls_for(tokens))

    def run(wanted: Any) -> tuple[float, Any]:
        results = once(work.start, work.draws[0], work.arrays)
        if wanted is not None and not relative_difference(results, wanted) <= TOLERANCE:
            raise ValueError("a wrong result")
        return microseconds(), results

    return Timer(lowered.as_text(), run)


def relative_difference(a: Any, b: Any) -> float:
    """The largest |a - b| / |b| of the arrays of two equal trees, NaN if there is any."""

    def of(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    return float(jnp.max(jnp.array(jax.tree.leaves(jax.tree.map(of, a, b)))))


def sections_of(choices: Sequence[Choice], table: "LaunchTable") -> dict[str, tuple[Any, ...]]:
    """The sections that these choices make, the later of two at the same number of tokens counting.

    table: what they began with.
    """
    from jmoe.triton_src.tile_candidates import ROWS, assemble, cut

    sections: dict[str, tuple[Any, ...]] = {}
    for name in dict.fromkeys(choice.section for choice in choices):
        best = {choice.rows: choice.tiles for choice in choices if choice.section == name}
        if name in ROWS:
            sections[name] = assemble([(rows, tiles[0]) for rows, tiles in sorted(best.items())])
        else:
            sections[name] = best[max(best)]
    if "packed_decode" in sections:
        most = most_rows_of_decode(choices, table.packed_decode[-1].rows)
        sections["packed_decode"] = cut(sections["packed_decode"], most)
    return sections


def most_rows_of_decode(choices: Sequence[Choice], before: float) -> float:
    """Up to which rows an expert packed_decode is the faster kernel, by forward passes if there are any; 0 if never.

    Between the last number at which it is and the first at which it is not lies the geometric mean. If it is at all of
    them, those `before` count too.
    """
    times = {(choice.section, choice.work, choice.rows): choice.microseconds for choice in choices}
    last = 0.0
    for rows in sorted({rows for section, _, rows in times if section in ("packed_decode", "packed_grouped_matmul")}):
        for work in ("forward", "lora"):
            grouped = times.get(("packed_grouped_matmul", work, rows))
            if grouped is not None:
                if times.get(("packed_decode", work, rows), math.inf) > grouped:
                    return math.sqrt(last * rows)
                break
        last = rows
    return before if last <= before else math.inf
