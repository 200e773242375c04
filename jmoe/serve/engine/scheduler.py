"""Which sequences the next step computes, and which wait: the engine's policy, without the device.

Sequences run in the order in which they came. Chunks of prompts and steps of those that decode take turns. Where pages
are short, the youngest that runs is put back in front of those that wait, and computed again with its tokens so far.
"""

import bisect
import dataclasses
from collections import deque

from jmoe.serve.engine.pages import Pages
from jmoe.serve.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Step:
    """One token of each of these sequences; the token's position is the sequence's `computed` - 1.

    size: rows of the program.
    """

    sequences: tuple[Sequence, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """`count` of a sequence's tokens from position `first` on; last: these are all it has, and the next is wanted."""

    sequence: Sequence
    first: int
    count: int
    last: bool


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Pieces one after another in a program of `size` tokens."""

    pieces: tuple[Piece, ...]
    size: int

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The pieces'."""
        return tuple(piece.sequence for piece in self.pieces)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds a step.

    Attributes:
      rows: sequences at once.
      row_sizes, chunk_sizes: of the programs, ascending.
      prefill_tokens: of a chunk while sequences decode.
      pieces: of a chunk.
    """

    rows: int
    row_sizes: tuple[int, ...]
    chunk_sizes: tuple[int, ...]
    prefill_tokens: int
    pieces: int


class Scheduler:
    """Sequences that wait and that run. A plan that it returns must be run, in this order, before the next is asked."""

    def __init__(self, pages: Pages, limits: Limits) -> None:
        self.pages = pages
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []
        self.preemptions = 0
        self._limits = limits
        self._rows = list(reversed(range(limits.rows)))
        self._arrivals = 0
        self._chunk_was_last = False
        # Pages that were free when the first that waits could not begin: it need not be tried again for these.
        self._too_few: tuple[int, int] | None = None

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the queue's end."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting.append(sequence)

    def end(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is; results of it that are still to come are nobody's."""
        if sequence.ended:
            return
        sequence.ended = True
        self._too_few = None
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self._stop(sequence)

    def put_back_all(self) -> None:
        """Puts all that run back, as after an error that has lost the cache."""
        for sequence in reversed(self.active[:]):
            self._put_back(sequence)

    def token_read(self, sequence: Sequence, token: int | None) -> None:
        """Takes the result of one planned step of a sequence that has not ended: its next token, or None of none."""
        sequence.pending -= 1
        if token is not None:
            sequence.tokens.append(token)
            if sequence.row is not None:
                self.pages.name(sequence.pages, sequence.tokens, sequence.names, sequence.computed)

    def plan(self) -> Step | Chunk | None:
        """The next step; None if there is nothing to do before results have been read or a sequence is added."""
        # Only now: what a step frees may be taken by the next one's programs, which run behind its own.
        for sequence in self.active:
            self.pages.slide(sequence.pages, sequence.computed)
        order = (self._plan_step, self._plan_chunk) if self._chunk_was_last else (self._plan_chunk, self._plan_step)
        for plan in order:
            planned = plan()
            if planned is not None:
                self._chunk_was_last = isinstance(planned, Chunk)
                return planned
        return None

    def _plan_step(self) -> Step | None:
        """A token of each sequence that decodes and has, or gets, a page for it."""
        planned = []
        for sequence in self.active[:]:
            if sequence.decodes and self._make_room(sequence, sequence.computed + 1):
                planned.append(sequence)
        if not planned:
            return None
        for sequence in planned:
            sequence.computed += 1
            sequence.pending += 1
        return Step(tuple(planned), smallest(self._limits.row_sizes, len(planned)))

    def _plan_chunk(self) -> Chunk | None:
        """Pieces of what is to be computed, the oldest first, then of sequences that begin."""
        room = self._limits.chunk_sizes[-1]
        if any(sequence.decodes for sequence in self.active):
            room = min(room, self._limits.prefill_tokens)
        pieces: list[Piece] = []
        filling = deque(sequence for sequence in self.active if sequence.filling)
        while room and len(pieces) < self._limits.pieces:
            sequence = filling.popleft() if filling else self._begin(room)
            if sequence is None:
                break
            if sequence.row is None:  # put back for an older one's sake
                continue
            piece = self._take_piece(sequence, room)
            if piece is None:
                break
            room -= piece.count
            pieces.append(piece)
        if not pieces:
            return None
        return Chunk(tuple(pieces), smallest(self._limits.chunk_sizes, sum(piece.count for piece in pieces)))

    def _take_piece(self, sequence: Sequence, room: int) -> Piece | None:
        """As many of a sequence's next tokens as there is room for; None if there are no pages for them."""
        first, count = sequence.computed, min(len(sequence.tokens) - sequence.computed, room)
        if not self._make_room(sequence, first + count):
            return None
        sequence.computed += count
        last = sequence.computed == len(sequence.tokens)
        if last:
            sequence.filling = False
            sequence.pending += 1
        # By name already: a chunk's keys are all written before any is read, so that a later piece may read these.
        self.pages.name(sequence.pages, sequence.tokens, sequence.names, sequence.computed)
        return Piece(sequence, first, count, last)

    def _begin(self, room: int) -> Sequence | None:
        """The first that waits, if it can begin now.

        Its whole prompt must have room beside what those before it still need, and a page for each that decodes: else
        it would be put back soon.
        """
        if not self.waiting or not self._rows or self.waiting[0].pending:
            return None
        free = self.pages.full.free, self.pages.windowed.free
        if self.active and free == self._too_few:
            return None
        sequence = self.waiting[0]
        own, there = self.pages.begin(sequence.tokens, sequence.names, share=sequence.shares)
        full, _ = self.pages.needed(own, len(sequence.tokens) + 1)
        _, windowed = self.pages.needed(own, there + min(room, len(sequence.tokens) - there))
        decoding = sum(other.decodes for other in self.active)
        promised = sum(
            self.pages.needed(other.pages, len(other.tokens) + 1)[0] for other in self.active if other.filling
        )
        enough = full + promised + decoding <= self.pages.full.free and windowed + decoding <= self.pages.windowed.free
        if self.active and not enough:
            self.pages.release(own)
            self._too_few = free
            return None
        self._too_few = None
        self.waiting.popleft()
        sequence.row, sequence.pages, sequence.computed, sequence.filling = self._rows.pop(), own, there, True
        if sequence.cached_tokens is None:
            sequence.cached_tokens = there
        bisect.insort(self.active, sequence, key=lambda other: other.arrival)
        return sequence

    def _make_room(self, sequence: Sequence, end: int) -> bool:
        """Whether a sequence that runs now has pages for its tokens before `end`; younger ones are put back for it."""
        while not self.pages.grow(sequence.pages, end):
            # Those that finish give their pages back without being computed again.
            victim = next((other for other in reversed(self.active) if not other.finishing), sequence)
            if victim is sequence:
                # An older one's pages come free, or this one waits for them as it has no right to those.
                if sequence is not self.active[0] and not any(other.finishing for other in self.active):
                    self._put_back(sequence)
                return False
            self._put_back(victim)
        return True

    def _put_back(self, sequence: Sequence) -> None:
        """To the front of those that wait; it keeps its tokens."""
        self._stop(sequence)
        sequence.computed, sequence.filling = 0, False
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        """Takes a sequence's row and pages."""
        assert sequence.row is not None
        self.active.remove(sequence)
        self._rows.append(sequence.row)
        sequence.row = None
        self.pages.release(sequence.pages)


def smallest(sizes: tuple[int, ...], count: int) -> int:
    """The first of these sizes that is enough."""
    return next(size for size in sizes if size >= count)
