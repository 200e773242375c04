"""Which adapter lies in which place, and who uses it."""

import dataclasses

from jmoe.gpt_oss.weights import LoraWeights
from jmoe.serve.engine.request import NameTakenError, NoPlaceError, UnknownAdapterError


@dataclasses.dataclass(eq=False)
class Adapter:
    """An adapter in its place.

    weights: on the host, from where it is put on the device again after an error.
    serial: its number among all that were ever loaded.
    users: requests that name it and have not ended.
    leaving: it has been unloaded, and its place will be free.
    lost: an error has taken the layers that were on the device before it was loaded.
    """

    name: str
    place: int
    weights: LoraWeights
    serial: int
    users: int = 0
    leaving: bool = False
    lost: bool = False


class LoadedAdapters:
    """The places' adapters; the engine's lock guards it."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.free = list(reversed(range(places)))
        self._named: dict[str, Adapter] = {}
        self._coming: dict[str, Adapter] = {}
        self._leaving: set[Adapter] = set()
        self._serial = 0

    def names(self) -> tuple[str, ...]:
        """Those that requests may use."""
        return tuple(self._named)

    def reserve(self, name: str, weights: LoraWeights) -> Adapter:
        """A place for an adapter that is being loaded, of weights on the host.

        Raises:
          NameTakenError: the name is taken.
          NoPlaceError: all places are.
        """
        if name in self._named or name in self._coming:
            raise NameTakenError(f"an adapter {name!r} is loaded already")
        if not self.free:
            raise NoPlaceError(f"all {self.places} places for adapters are taken")
        self._serial += 1
        self._coming[name] = Adapter(name, self.free.pop(), weights, self._serial)
        return self._coming[name]

    def loaded(self, adapter: Adapter) -> None:
        """Lets requests name an adapter that is in its place.

        Raises:
          RuntimeError: it is there no more.
        """
        if adapter.lost:
            raise RuntimeError("an error has taken what was there of it from the device")
        del self._coming[adapter.name]
        self._named[adapter.name] = adapter

    def failed(self, adapter: Adapter) -> None:
        """Frees the place of one that could not be loaded."""
        del self._coming[adapter.name]
        self.free.append(adapter.place)

    def to_restore(self) -> list[Adapter]:
        """Those that are to be in their places, where nothing is any more; those that are being loaded are lost."""
        for adapter in self._coming.values():
            adapter.lost = True
        return [*self._named.values(), *self._leaving]

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
        self._leaving.add(adapter)
        self._free_place(adapter)

    def _free_place(self, adapter: Adapter) -> None:
        if adapter.leaving and not adapter.users:
            self._leaving.remove(adapter)
            self.free.append(adapter.place)
