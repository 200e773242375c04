"""The pages that each sequence holds, of full layers and of windowed ones."""

import dataclasses
from collections.abc import Sequence

from jmoe.serve.engine.page_names import PageNames
from jmoe.serve.engine.page_pool import PagePool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """How the cache is cut into pages.

    Attributes:
      page_size: tokens of a page.
      window: tokens that windowed layers see; None: there are no such layers.
      full_pages, windowed_pages: of each kind, page 0 among them.
      full_columns, windowed_columns: of a sequence's table: page p of a sequence stands at column p, and of windowed
        layers at p % windowed_columns.
    """

    page_size: int
    window: int | None
    full_pages: int
    windowed_pages: int
    full_columns: int
    windowed_columns: int

    def pages(self, tokens: int) -> int:
        """Pages of so many tokens."""
        return -(-tokens // self.page_size)

    def first_seen(self, position: int) -> int:
        """The first page that windowed layers need for the token at this position."""
        return max(0, position - (self.window or 0) + 1) // self.page_size


@dataclasses.dataclass
class SequencePages:
    """What one sequence holds.

    full: its pages, one after another.
    windowed: likewise from page `first_windowed` on; those before lie behind the window.
    named: how many of its whole pages others may find.
    """

    full: list[int] = dataclasses.field(default_factory=list)
    windowed: list[int] = dataclasses.field(default_factory=list)
    first_windowed: int = 0
    named: int = 0


class Pages:
    """Both kinds' pools, and what sequences do with them."""

    def __init__(self, geometry: Geometry, *, caching: bool) -> None:
        """caching: whether a sequence may begin with what another has computed."""
        self.geometry = geometry
        self.full = PagePool(geometry.full_pages)
        self.windowed = PagePool(geometry.windowed_pages)
        self._caching = caching

    def begin(self, tokens: Sequence[int], names: PageNames, *, share: bool = True) -> tuple[SequencePages, int]:
        """(a new sequence's pages, how many of its tokens they hold already).

        The last token is never among these: its logits are wanted.

        share: False: begin with nothing.
        """
        own = SequencePages()
        if not (self._caching and share):
            return own, 0
        wanted = names.between(0, (len(tokens) - 1) // self.geometry.page_size, tokens)
        there = next((i for i, name in enumerate(wanted) if self.full.find(name) is None), len(wanted))
        while there and not self._window_is_there(wanted, there):
            there -= 1
        own.named = there
        own.first_windowed = self._first_windowed(there)
        own.full = [self._hold(self.full, name) for name in wanted[:there]]
        if self.geometry.window is not None:
            own.windowed = [self._hold(self.windowed, name) for name in wanted[own.first_windowed : there]]
        return own, there * self.geometry.page_size

    def needed(self, own: SequencePages, end: int) -> tuple[int, int]:
        """How many more (full, windowed) pages the sequence needs for its tokens before `end`."""
        pages = self.geometry.pages(end)
        windowed = 0 if self.geometry.window is None else pages - own.first_windowed - len(own.windowed)
        return max(0, pages - len(own.full)), max(0, windowed)

    def grow(self, own: SequencePages, end: int) -> bool:
        """Whether the sequence now has pages for its tokens before `end`; takes all or none."""
        full, windowed = self.needed(own, end)
        if full > self.full.free or windowed > self.windowed.free:
            return False
        own.full += [self.full.take() for _ in range(full)]
        own.windowed += [self.windowed.take() for _ in range(windowed)]
        return True

    def slide(self, own: SequencePages, position: int) -> None:
        """Gives back windowed pages that the token at this position, and so none after it, does not need."""
        first = self.geometry.first_seen(position)
        while own.windowed and own.first_windowed < first:
            self.windowed.give_back(own.windowed.pop(0))
            own.first_windowed += 1

    def name(self, own: SequencePages, tokens: Sequence[int], names: PageNames, end: int) -> None:
        """Lets others find the sequence's whole pages of tokens before `end`."""
        whole = min(end, len(tokens)) // self.geometry.page_size
        if not self._caching or whole <= own.named:
            return
        for page, name in enumerate(names.between(own.named, whole, tokens), own.named):
            self.full.name(own.full[page], name)
            if self.geometry.window is not None and page >= own.first_windowed:
                self.windowed.name(own.windowed[page - own.first_windowed], name)
        own.named = whole

    def release(self, own: SequencePages) -> None:
        """Gives all of a sequence's pages back, the last first, which are the least likely to be shared."""
        while own.full:
            self.full.give_back(own.full.pop())
        while own.windowed:
            self.windowed.give_back(own.windowed.pop())

    def forget(self, own: SequencePages) -> None:
        """Nobody shall find the sequence's pages any more."""
        for page in own.full:
            self.full.forget(page)
        for page in own.windowed:
            self.windowed.forget(page)

    def forget_all(self) -> None:
        """Nobody shall find any page any more."""
        self.full.forget_all()
        self.windowed.forget_all()

    def full_page(self, own: SequencePages, position: int) -> int:
        """The full layers' page of a token."""
        return own.full[position // self.geometry.page_size]

    def windowed_page(self, own: SequencePages, position: int) -> int:
        """The windowed layers' page of a token; 0 where there are no such layers."""
        if self.geometry.window is None:
            return 0
        return own.windowed[position // self.geometry.page_size - own.first_windowed]

    def _first_windowed(self, pages: int) -> int:
        """The first windowed page that a sequence needs once it has so many whole pages."""
        return 0 if self.geometry.window is None else self.geometry.first_seen(pages * self.geometry.page_size)

    def _window_is_there(self, names: Sequence[bytes], pages: int) -> bool:
        """Whether what windowed layers see after so many of these pages is all there."""
        if self.geometry.window is None:
            return True
        seen = range(self._first_windowed(pages), pages)
        return all(self.windowed.find(names[page]) is not None for page in seen)

    @staticmethod
    def _hold(pool: PagePool, name: bytes) -> int:
        """The page of a name that is there, held once more."""
        page = pool.find(name)
        assert page is not None
        pool.share(page)
        return page
