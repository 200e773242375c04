"""Which adapter lies in which place, and who uses it."""

import dataclasses

from jmoe.serve.engine.request import NameTakenError, NoPlaceError, UnknownAdapterError


@dataclasses.dataclass(eq=False)
class Adapter:
    """An adapter in its place.

    serial: its number among all that were ever loaded.
    users: requests that name it and have not ended.
    leaving: it has been unloaded, and its place will be free.
    """

    name: str
    place: int
    serial: int
    users: int = 0
    leaving: bool = False


class LoadedAdapters:
    """The places' adapters; the engine's lock guards it."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.free = list(reversed(range(places)))
        self._named: dict[str, Adapter] = {}
        self._coming: set[str] = set()
        self._serial = 0

    def names(self) -> tuple[str, ...]:
        """Those that requests may use."""
        return tuple(self._named)

    def reserve(self, name: str) -> Adapter:
        """A place for an adapter that is being loaded.

        Raises:
          NameTakenError: the name is taken.
          NoPlaceError: all places are.
        """
        if name in self._named or name in self._coming:
            raise NameTakenError(f"an adapter {name!r} is loaded already")
        if not self.free:
            raise NoPlaceError(f"all {self.places} places for adapters are taken")
        self._coming.add(name)
        self._serial += 1
        return Adapter(name, self.free.pop(), self._serial)

    def loaded(self, adapter: Adapter) -> None:
        """Lets requests name an adapter that is in its place."""
        self._coming.discard(adapter.name)
        self._named[adapter.name] = adapter

    def failed(self, adapter: Adapter) -> None:
        """Frees the place of one that could not be loaded."""
        self._coming.discard(adapter.name)
        self.free.append(adapter.place)

    def use(self, name: str | None) -> Adapter | None:
        """The adapter of a new request, None of none.

        Raises:
          UnknownAdapterError: it is not loaded.
        """
        if name is None:
            return None
        adapter = self._named.get(name)
        if adapter is None:
            raise UnknownAdapterError(f"no adapter {name!r} is loaded")
        adapter.users += 1
        return adapter

    def release(self, adapter: Adapter | None) -> None:
        """A request that used it has ended."""
        if adapter is not None:
            adapter.users -= 1
            self._free_place(adapter)

    def unload(self, name: str) -> None:
        """New requests cannot name it; its place is free once nobody uses it.

        Raises:
          UnknownAdapterError: it is not loaded.
        """
        adapter = self._named.pop(name, None)
        if adapter is None:
            raise UnknownAdapterError(f"no adapter {name!r} is loaded")
        adapter.leaving = True
        self._free_place(adapter)

    def _free_place(self, adapter: Adapter) -> None:
        if adapter.leaving and not adapter.users:
            self.free.append(adapter.place)
