"""Where the engine's arrays lie: on one device, or on a mesh as the model's layout has them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layout import Layout, split_along
from jmoe.gpt_oss.model import GptOss
from jmoe.serve.engine.adapter_places import AdapterPlaces
from jmoe.serve.engine.device_state import DeviceState, PageState


@dataclasses.dataclass(frozen=True)
class Placement:
    """A model's mesh and layout, which splits no batches: pages are all sequences' together."""

    mesh: Mesh
    layout: Layout

    @classmethod
    def of(cls, model: GptOss) -> Self | None:
        """The model's; None on one device.

        Raises:
          ValueError: the layout would split batches.
        """
        if model.layout is None:
            return None
        sharding = model.embedding.get_value().sharding
        assert isinstance(sharding, NamedSharding)
        mesh, layout = sharding.mesh, model.layout
        assert isinstance(mesh, Mesh)
        check_layout(mesh, layout)
        return cls(mesh, layout)

    @property
    def whole(self) -> NamedSharding:
        """On every device."""
        return NamedSharding(self.mesh, P())

    @property
    def heads(self) -> int:
        """Parts that heads are in."""
        return self.layout.size(self.mesh, self.layout.heads)

    def config(self, config: Config) -> Config:
        """The model's with a device's heads."""
        return self.layout.config_of_device(self.mesh, config)

    def pages(self, pages: PageState) -> Any:
        """The sharding of each of its arrays: pages are split by heads."""
        by_heads = NamedSharding(self.mesh, split_along(None, None, self.layout.heads))
        return dataclasses.replace(
            jax.tree.map(lambda _: self.whole, pages), cache=tuple(by_heads for _ in pages.cache)
        )

    def places(self, places: AdapterPlaces) -> Any:
        """The sharding of each of its arrays."""
        attention = places.attention and self.layout.attention_lora(places.attention)
        return self.layout.shardings(self.mesh, AdapterPlaces(attention, self.layout.lora(places.experts)))

    def state(self, state: DeviceState) -> Any:
        """The sharding of each of its arrays."""
        whole = jax.tree.map(lambda _: self.whole, state)
        return dataclasses.replace(whole, pages=self.pages(state.pages))


def check_layout(mesh: Mesh, layout: Layout) -> None:
    """Raises ValueError if the layout splits batches."""
    parts = layout.size(mesh, layout.data)
    if parts > 1:
        raise ValueError(
            "the server splits experts and heads over devices, and no batches: start one for each part of the devices "
            f"instead of a data axis, got {layout.data}={parts}"
        )


def made[T](make: Callable[[], T], shardings: Callable[[T], Any] | None) -> T:
    """What `make` makes, on a mesh each device its own part."""
    if shardings is None:
        return make()
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make)))()
