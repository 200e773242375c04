"""The pages of one kind of layers: who holds them, and which free ones still have something worth keeping."""

from collections import OrderedDict, deque


class PagePool:
    """Counts who holds each page; a free page whose content has a name stays findable until it is taken.

    Page 0 is nobody's: what no sequence needs is written there.
    """

    def __init__(self, pages: int) -> None:
        """pages: how many, page 0 among them."""
        self._holders = [0] * pages
        self._empty = deque(range(1, pages))
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        # Free pages with a name; the first has been free the longest.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def total(self) -> int:
        """Pages that sequences may hold."""
        return len(self._holders) - 1

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._empty) + len(self._cached)

    @property
    def cached(self) -> int:
        """Of the free ones, those with a name."""
        return len(self._cached)

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders[page]

    def take(self) -> int:
        """A free page, now held once: one without a name, or else the one that has been free the longest.

        Raises:
          IndexError: none is free.
        """
        if self._empty:
            page = self._empty.popleft()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        else:
            raise IndexError("no page is free")
        self._holders[page] = 1
        return page

    def find(self, name: bytes) -> int | None:
        """The page whose content has this name, or None."""
        return self._named.get(name)

    def share(self, page: int) -> None:
        """Holds a page once more that has been found."""
        self._cached.pop(page, None)
        self._holders[page] += 1

    def name(self, page: int, name: bytes) -> None:
        """Names the content of a page that is held, unless another page has that name."""
        if name not in self._named and page not in self._names:
            self._named[name] = page
            self._names[page] = name

    def give_back(self, page: int) -> None:
        """Holds a page once less."""
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._names:
            self._cached[page] = None
        else:
            self._empty.append(page)

    def forget(self, page: int) -> None:
        """Takes a page's name away, so that nobody finds it any more."""
        self._forget(page)
        if page in self._cached:
            del self._cached[page]
            self._empty.append(page)

    def forget_all(self) -> None:
        """Takes all names away."""
        for page in list(self._names):
            self.forget(page)

    def _forget(self, page: int) -> None:
        name = self._names.pop(page, None)
        if name is not None:
            del self._named[name]
