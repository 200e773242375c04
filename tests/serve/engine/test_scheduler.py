"""The scheduler with a model of memory: whatever comes and goes, each sequence gets the tokens that it gets alone.

The model here reads every key that a token sees from the pages that the scheduler gave it, and fails where one is not
there: another sequence's, another position's, or none.
"""

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jmoe.serve.engine.page_names import PageNames
from jmoe.serve.engine.pages import Geometry, Pages
from jmoe.serve.engine.runner import MOST_PIECES, sizes_up_to
from jmoe.serve.engine.scheduler import Chunk, Limits, Piece, Scheduler, Step
from jmoe.serve.engine.sequence import Sequence
from jmoe.serve.engine.settings import CHUNK_SIZES

SIZE, WINDOW, VOCABULARY = 4, 6, 50


def next_token(tokens: list[int], identity: bytes) -> int:
    """What the model says after these."""
    return (7 * sum(tokens) + 3 * len(tokens) + identity[0]) % VOCABULARY


@dataclasses.dataclass
class Device:
    """Pages and rows as programs leave them: the programs run in the order in which they are planned."""

    pages: Pages
    memory: dict[tuple[str, int, int], Any] = dataclasses.field(default_factory=dict)
    rows: dict[int, int] = dataclasses.field(default_factory=dict)
    identities: dict[Sequence, bytes] = dataclasses.field(default_factory=dict)

    def write(self, sequence: Sequence, position: int, token: int) -> None:
        offset, key = position % SIZE, (position, token, self.identities[sequence])
        self.memory["full", self.pages.full_page(sequence.pages, position), offset] = key
        self.memory["windowed", self.pages.windowed_page(sequence.pages, position), offset] = key

    def read(self, sequence: Sequence, position: int) -> list[int]:
        """The tokens up to a position, by the keys that it sees."""
        tokens = []
        for seen in range(position + 1):
            key = self.memory["full", self.pages.full_page(sequence.pages, seen), seen % SIZE]
            assert (key[0], key[2]) == (seen, self.identities[sequence])
            if seen > position - WINDOW:
                assert self.memory["windowed", self.pages.windowed_page(sequence.pages, seen), seen % SIZE] == key
            tokens.append(key[1])
        return tokens

    def run(self, plan: Step | Chunk) -> list[tuple[Sequence, int]]:
        """The results of a step."""
        tasks: list[tuple[Sequence, int, list[int], bool]] = []
        if isinstance(plan, Step):
            for sequence in plan.sequences:
                assert sequence.row is not None
                tasks.append((sequence, sequence.computed - 1, [self.rows[sequence.row]], True))
        else:
            for piece in plan.pieces:
                known = piece.sequence.tokens[piece.first : piece.first + piece.count]
                tasks.append((piece.sequence, piece.first, known, piece.last))
        for sequence, first, known, _ in tasks:
            for offset, token in enumerate(known):
                self.write(sequence, first + offset, token)
        results = []
        for sequence, first, known, last in tasks:
            for offset in range(len(known)):
                tokens = self.read(sequence, first + offset)
            if last:
                assert sequence.row is not None
                self.rows[sequence.row] = next_token(tokens, self.identities[sequence])
                results.append((sequence, self.rows[sequence.row]))
        return results


@dataclasses.dataclass
class Session:
    """The engine's loop: results of a step are read when the next one has been planned."""

    scheduler: Scheduler
    device: Device
    stop: int | None = None
    outstanding: list[list[tuple[Sequence, int]]] = dataclasses.field(default_factory=list)
    ended: list[Sequence] = dataclasses.field(default_factory=list)
    plans: list[Step | Chunk] = dataclasses.field(default_factory=list)

    def step(self) -> bool:
        """One turn; whether there was anything to do."""
        plan = self.scheduler.plan()
        if plan is not None:
            check_plan(plan)
            self.plans.append(plan)
            self.outstanding.append(self.device.run(plan))
        if self.outstanding and (plan is None or len(self.outstanding) > 1):
            for sequence, token in self.outstanding.pop(0):
                self.read(sequence, token)
            return True
        return plan is not None

    def read(self, sequence: Sequence, token: int) -> None:
        if sequence.ended:
            return
        stopped = token == self.stop
        self.scheduler.token_read(sequence, None if stopped else token)
        if stopped or sequence.new_tokens == sequence.max_tokens:
            self.scheduler.end(sequence)
            self.ended.append(sequence)

    def run(self) -> None:
        for _ in range(10_000):
            if not self.step():
                return
        raise AssertionError("there is no end")


def check_plan(plan: Step | Chunk) -> None:
    if isinstance(plan, Step):
        assert 1 <= len(plan.sequences) <= plan.size
    else:
        assert 1 <= sum(piece.count for piece in plan.pieces) <= plan.size
        assert all(piece.count > 0 for piece in plan.pieces)
        assert len({id(piece.sequence) for piece in plan.pieces}) == len(plan.pieces)


def session(
    full: int = 12, windowed: int = 12, *, rows: int = 4, caching: bool = True, stop: int | None = None
) -> Session:
    geometry = Geometry(
        page_size=SIZE,
        window=WINDOW,
        full_pages=full + 1,
        windowed_pages=windowed + 1,
        full_columns=full,
        windowed_columns=windowed,
    )
    pages = Pages(geometry, caching=caching)
    limits = Limits(rows=rows, row_sizes=(1, 2, 4), chunk_sizes=(4, 16), prefill_tokens=6, pieces=3)
    return Session(Scheduler(pages, limits), Device(pages), stop)


def add(session: Session, prompt: list[int], max_tokens: int, identity: bytes = b"base") -> Sequence:
    sequence = Sequence(list(prompt), len(prompt), max_tokens, PageNames(identity, SIZE))
    session.device.identities[sequence] = identity
    session.scheduler.add(sequence)
    return sequence


def alone(prompt: list[int], max_tokens: int, identity: bytes, stop: int | None) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        token = next_token(tokens, identity)
        if token == stop:
            break
        tokens.append(token)
    return tokens


def nothing_is_held(session: Session) -> bool:
    pages = session.scheduler.pages
    return pages.full.free == pages.full.total and pages.windowed.free == pages.windowed.total


def test_chunks_and_steps_take_turns() -> None:
    run = session(full=40, windowed=40)
    add(run, [1] * 5, 12)
    run.step()
    add(run, list(range(2, 20)), 3)
    run.run()
    kinds = [
        (type(plan).__name__, plan.size, sum(p.count for p in plan.pieces) if isinstance(plan, Chunk) else 1)
        for plan in run.plans
    ]
    # 18 tokens at 6 a chunk while the first decodes, and no chunk behind another.
    assert kinds[:8] == [
        ("Chunk", 16, 5),
        ("Step", 1, 1),
        ("Chunk", 16, 6),
        ("Step", 1, 1),
        ("Chunk", 16, 6),
        ("Step", 1, 1),
        ("Chunk", 16, 6),
        ("Step", 2, 1),
    ]


def served() -> tuple[Scheduler, Limits]:
    """A scheduler of the engine's default sizes, and pages enough."""
    geometry = Geometry(
        page_size=64, window=128, full_pages=400, windowed_pages=400, full_columns=64, windowed_columns=70
    )
    rows = sizes_up_to(64)
    own = Limits(rows=64, row_sizes=rows, chunk_sizes=CHUNK_SIZES, prefill_tokens=1024, pieces=MOST_PIECES)
    return Scheduler(Pages(geometry, caching=False), own), own


def come(scheduler: Scheduler, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        scheduler.add(Sequence(list(range(215)), 215, 199, PageNames(b"%d" % number, 64)))


def done(scheduler: Scheduler, plan: Step | Chunk | None) -> tuple[str, int, int]:
    """Reads a plan's results; its kind, its program's size, its sequences."""
    assert plan is not None
    check_plan(plan)
    for number, sequence in enumerate(plan.sequences):
        if isinstance(plan, Step) or plan.pieces[number].last:
            scheduler.token_read(sequence, 7)
    return type(plan).__name__, plan.size, len(plan.sequences)


def test_prompts_that_come_together_are_one_chunk() -> None:
    scheduler, _ = served()
    come(scheduler, 16)
    assert [done(scheduler, scheduler.plan()) for _ in range(2)] == [("Chunk", 4096, 16), ("Step", 16, 16)]


def test_prompts_that_come_while_others_run_fill_chunks_at_once_and_each_is_as_long_as_may_be() -> None:
    scheduler, limits = served()
    come(scheduler, 4)
    for _ in range(3):
        done(scheduler, scheduler.plan())
    come(scheduler, 16, first=4)
    kinds = [done(scheduler, scheduler.plan()) for _ in range(8)]
    # 16 prompts are 3440 tokens: three chunks of 1024 and 368 more, of which none begins later than it may.
    assert [kind for kind, _, _ in kinds] == ["Chunk", "Step"] * 4
    assert [size for kind, size, _ in kinds if kind == "Chunk"] == [limits.prefill_tokens] * 3 + [512]
    assert kinds[-1] == ("Step", 32, 20)


def test_prompts_share_a_chunk_and_what_it_computes() -> None:
    run = session(full=40, windowed=40)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    first, second = add(run, prompt, 2), add(run, prompt, 2)
    run.step()
    (plan,) = run.plans
    assert isinstance(plan, Chunk)
    assert plan.pieces == (Piece(first, 0, 9, True), Piece(second, 8, 1, True))
    run.run()
    assert second.cached_tokens == 8
    assert first.tokens == second.tokens == alone(prompt, 2, b"base", None)


def test_the_youngest_is_put_back_and_gets_the_same_tokens() -> None:
    run = session(full=8, windowed=12, caching=False)
    sequences = [add(run, [i, i + 1, i + 2], 18) for i in range(3)]
    run.run()
    assert run.scheduler.preemptions > 0
    assert [sequence.tokens for sequence in sequences] == [
        alone([i, i + 1, i + 2], 18, b"base", None) for i in range(3)
    ]
    assert run.ended[0] is sequences[0]
    assert nothing_is_held(run)


def test_what_fits_alone_is_computed_with_as_few_pages() -> None:
    run = session(full=6, windowed=6)
    sequences = [add(run, list(range(12)), 12), add(run, list(range(20, 40)), 4)]
    run.run()
    assert [len(sequence.tokens) for sequence in sequences] == [24, 24]
    assert nothing_is_held(run)


def test_what_was_put_back_begins_again_once_its_tokens_are_read() -> None:
    run = session()
    sequence = add(run, [1, 2, 3], 4)
    run.step()
    run.scheduler.put_back_all()
    assert sequence.pending == 1
    assert run.scheduler.plan() is None
    run.run()
    assert sequence.tokens == alone([1, 2, 3], 4, b"base", None)


@pytest.mark.parametrize("steps", range(6))
def test_a_sequence_may_end_at_any_time(steps: int) -> None:
    run = session()
    other, gone = add(run, [1, 2, 3], 6), add(run, [4, 5, 6, 7, 8], 6)
    for _ in range(steps):
        run.step()
    run.scheduler.end(gone)
    run.scheduler.end(gone)
    run.run()
    assert other.tokens == alone([1, 2, 3], 6, b"base", None)
    assert run.ended == [other]
    assert nothing_is_held(run)


def test_what_an_error_lost_is_computed_again() -> None:
    run = session()
    sequences = [add(run, [i] * 5, 6) for i in range(3)]
    for _ in range(3):
        run.step()
    run.scheduler.put_back_all()
    run.scheduler.pages.forget_all()
    assert nothing_is_held(run)
    run.device.memory.clear()
    run.run()
    assert [sequence.tokens for sequence in sequences] == [alone([i] * 5, 6, b"base", None) for i in range(3)]


@dataclasses.dataclass(frozen=True)
class Arrival:
    after: int
    prompt: list[int]
    max_tokens: int
    identity: bytes
    cancelled_after: int | None


prefixes = st.sampled_from([[], [9] * 4, [9] * 8, [9] * 8 + [8] * 5])
arrivals = st.builds(
    Arrival,
    after=st.integers(0, 6),
    prompt=st.builds(list.__add__, prefixes, st.lists(st.integers(0, 3), min_size=1, max_size=9)),
    max_tokens=st.integers(1, 9),
    identity=st.sampled_from([b"base", b"adapter"]),
    cancelled_after=st.one_of(st.none(), st.integers(0, 12)),
)


@settings(max_examples=150)
@given(
    requests=st.lists(arrivals, min_size=1, max_size=14),
    full=st.integers(8, 20),
    windowed=st.integers(8, 20),
    rows=st.integers(1, 4),
    caching=st.booleans(),
    stop=st.one_of(st.none(), st.integers(0, 9)),
)
def test_whatever_comes_and_goes(
    requests: list[Arrival], full: int, windowed: int, rows: int, caching: bool, stop: int | None
) -> None:
    run = session(full, windowed, rows=rows, caching=caching, stop=stop)
    sequences: list[tuple[Sequence, Arrival]] = []
    cancellations: list[tuple[int, Sequence]] = []
    turn = 0
    for request in requests:
        for _ in range(request.after):
            run.step()
            turn += 1
            for when, sequence in cancellations:
                if when == turn:
                    run.scheduler.end(sequence)
        sequence = add(run, request.prompt, request.max_tokens, request.identity)
        sequences.append((sequence, request))
        if request.cancelled_after is not None:
            cancellations.append((turn + request.cancelled_after, sequence))
    run.run()
    assert not run.scheduler.active
    assert not run.scheduler.waiting
    assert nothing_is_held(run)
    assert all(sequence.ended for sequence, _ in sequences)
    assert len(set(map(id, run.ended))) == len(run.ended)
    cancelled = {id(sequence) for _, sequence in cancellations}
    for sequence, request in sequences:
        text = alone(request.prompt, request.max_tokens, request.identity, stop)
        if id(sequence) in cancelled:
            assert sequence.tokens == text[: len(sequence.tokens)]
        else:
            assert sequence.tokens == text
            assert sequence in run.ended
