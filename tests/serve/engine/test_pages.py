"""Pages of sequences: none in two places, all free in the end, prefixes found as long as they are there."""

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from jmoe.serve.engine.page_names import PageNames
from jmoe.serve.engine.pages import Geometry, Pages, SequencePages

SIZE, WINDOW = 4, 6


def geometry(full: int = 12, windowed: int = 9, window: int | None = WINDOW) -> Geometry:
    return Geometry(
        page_size=SIZE,
        window=window,
        full_pages=full,
        windowed_pages=windowed,
        full_columns=full,
        windowed_columns=windowed,
    )


def names(identity: bytes = b"base") -> PageNames:
    return PageNames(identity, SIZE)


def computed(pages: Pages, tokens: list[int], identity: bytes = b"base") -> SequencePages:
    """A sequence whose tokens have all been computed at once."""
    own, _ = pages.begin(tokens, names(identity))
    assert pages.grow(own, len(tokens))
    pages.name(own, tokens, names(identity), len(tokens))
    return own


def test_a_prefix_is_found_by_its_whole_pages() -> None:
    pages = Pages(geometry(), caching=True)
    first = computed(pages, list(range(11)))
    own, there = pages.begin([*range(9), 99, 98, 97, 96], names())
    assert there == 8
    assert own.full == first.full[:2]
    assert own.windowed == first.windowed[:2]
    assert [pages.full.holders(page) for page in first.full] == [2, 2, 1]
    # Whole pages alone, and never the last token.
    assert pages.begin(list(range(8)), names())[1] == 4
    assert pages.begin(list(range(9)), names(b"adapter"))[1] == 0
    assert pages.begin(list(range(9)), names(), share=False)[1] == 0


class Counted(list[bytes]):
    """A list that counts what is taken of it in slices."""

    taken = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if isinstance(key, slice):
            Counted.taken += len(found)
        return found


def test_what_beginning_and_naming_take_is_linear_in_the_prompt(monkeypatch: Any) -> None:
    pages, length = Pages(geometry(500, 500), caching=True), 400
    tokens, own = list(range(length * SIZE + 1)), names()
    own._names = Counted()
    held = SequencePages()
    assert pages.grow(held, len(tokens))
    for end in range(len(tokens)):
        pages.name(held, tokens, own, end)
    assert len(own._names) == length
    monkeypatch.setattr(own, "between", lambda *_: Counted(list(own._names)))
    pages.windowed.forget_all()
    assert pages.begin(tokens, own)[1] == 0
    assert Counted.taken <= 4 * length


def test_without_caching_nothing_is_found() -> None:
    pages = Pages(geometry(), caching=False)
    pages.release(computed(pages, list(range(11))))
    assert pages.begin(list(range(11)), names())[1] == 0
    assert pages.full.cached == 0


def test_released_pages_are_found_until_they_are_taken() -> None:
    pages = Pages(geometry(windowed=12), caching=True)
    tokens = list(range(12))
    pages.release(computed(pages, tokens))
    assert (pages.full.free, pages.full.cached) == (11, 3)
    own, there = pages.begin([*tokens, 5], names())
    assert there == 12
    pages.release(own)
    other = computed(pages, [77] * 36)  # nine pages, of eleven
    # The first page, which most prompts share, is the last to go.
    assert pages.full.find(names().between(0, 1, tokens)[0]) is not None
    pages.release(other)


def test_windowed_pages_behind_the_window_are_given_back() -> None:
    pages = Pages(geometry(), caching=False)
    own = computed(pages, list(range(20)))
    pages.slide(own, 19)  # sees 14 to 19
    assert (own.first_windowed, len(own.windowed)) == (3, 2)
    assert pages.windowed.free == 6
    assert pages.windowed_page(own, 14) == own.windowed[0]
    pages.slide(own, 21)  # sees 16 to 21
    assert (own.first_windowed, len(own.windowed)) == (4, 1)


def test_a_prefix_whose_window_is_gone_is_a_shorter_one() -> None:
    pages = Pages(geometry(windowed=6), caching=True)
    tokens = list(range(16))
    first = computed(pages, tokens)
    pages.slide(first, 16)  # sees 11 to 16: pages 0 and 1 are free, 2 and 3 held
    assert pages.begin(tokens, names())[1] == 12
    pages = Pages(geometry(windowed=5), caching=True)
    first = computed(pages, tokens)
    pages.slide(first, 16)
    pages.release(computed(pages, [50, 51, 52, 53, 54], b"other"))  # takes the two free pages
    own, there = pages.begin([*tokens, 1], names())
    assert there == 16
    assert pages.begin(tokens, names())[1] == 0
    pages.release(own)


def test_without_windowed_layers_only_full_pages_count() -> None:
    pages = Pages(geometry(windowed=1, window=None), caching=True)
    own = computed(pages, list(range(11)))
    pages.slide(own, 11)
    assert own.windowed == []
    assert pages.windowed_page(own, 3) == 0
    assert pages.begin(list(range(11)), names())[1] == 8


def test_a_page_that_is_forgotten_is_not_found() -> None:
    pages = Pages(geometry(), caching=True)
    own = computed(pages, list(range(12)))
    pages.forget(own)
    pages.release(own)
    assert pages.begin(list(range(12)), names())[1] == 0
    assert pages.full.free == pages.full.total


class PagesMachine(RuleBasedStateMachine):
    """Sequences that come, grow, slide and go in any order."""

    sequences: Bundle[Any] = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(geometry(), caching=True)
        self.live: list[dict[str, Any]] = []
        # What was computed into each page: (identity, all tokens up to the page's end).
        self.content: dict[tuple[str, int], tuple[bytes, tuple[int, ...]]] = {}

    @rule(target=sequences, length=st.integers(1, 30), kind=st.integers(0, 2), identity=st.sampled_from([b"a", b"b"]))
    def begin(self, length: int, kind: int, identity: bytes) -> dict[str, Any]:
        tokens = [*range(min(length, 7 * kind)), *([kind] * 30)][:length]
        own_names = names(identity)
        own, there = self.pages.begin(tokens, own_names)
        assert there % SIZE == 0
        assert there < length
        for page in range(there // SIZE):
            wanted = identity, tuple(tokens[: (page + 1) * SIZE])
            assert self.content["full", own.full[page]] == wanted
            if page >= own.first_windowed:
                assert self.content["windowed", own.windowed[page - own.first_windowed]] == wanted
        assert own.first_windowed <= max(0, there - WINDOW + 1) // SIZE
        sequence = {"own": own, "tokens": tokens, "names": own_names, "identity": identity, "end": there}
        self.live.append(sequence)
        return sequence

    @rule(sequence=sequences, by=st.integers(1, 9))
    def grow(self, sequence: dict[str, Any], by: int) -> None:
        own, tokens = sequence["own"], sequence["tokens"]
        end = min(sequence["end"] + by, len(tokens))
        before = self.pages.full.free, self.pages.windowed.free
        needed = self.pages.needed(own, end)
        grown = self.pages.grow(own, end)
        assert grown == all(need <= free for need, free in zip(needed, before, strict=True))
        if not grown:
            assert (self.pages.full.free, self.pages.windowed.free) == before
            return
        for position in range(sequence["end"], end):
            known = sequence["identity"], tuple(tokens[: (position // SIZE + 1) * SIZE])
            self.content["full", self.pages.full_page(own, position)] = known
            self.content["windowed", self.pages.windowed_page(own, position)] = known
        sequence["end"] = end
        self.pages.name(own, tokens, sequence["names"], end)

    @rule(sequence=sequences)
    def slide(self, sequence: dict[str, Any]) -> None:
        self.pages.slide(sequence["own"], sequence["end"])

    @rule(sequence=consumes(sequences))
    def release(self, sequence: dict[str, Any]) -> None:
        self.pages.release(sequence["own"])
        self.live.remove(sequence)

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        for kind, pool in (("full", self.pages.full), ("windowed", self.pages.windowed)):
            held = [page for sequence in self.live for page in getattr(sequence["own"], kind)]
            assert 0 not in held
            assert all(pool.holders(page) == held.count(page) for page in range(1, pool.total + 1))
            assert len(set(held)) + pool.free == pool.total
            for sequence in self.live:
                own = getattr(sequence["own"], kind)
                assert len(set(own)) == len(own)

    def teardown(self) -> None:
        for sequence in self.live:
            self.pages.release(sequence["own"])
        assert self.pages.full.free == self.pages.full.total
        assert self.pages.windowed.free == self.pages.windowed.total


PagesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestPages = PagesMachine.TestCase
