"""jmoe's containers in flax.serialization, by which Linen's variables are saved."""

import dataclasses
from typing import Any

from flax import serialization

from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4
from jmoe.ops.routing import Routing


def register_states() -> None:
    """Lets to_bytes, to_state_dict and their inverses go into the containers; n and k are the target's."""
    for container in (Mxfp4, PackedMxfp4, Experts, Lora, Routing):
        serialization.register_serialization_state(container, state_of, with_state)


def state_of(container: Any) -> dict[str, Any]:
    """The states of its arrays by name."""
    return {name: serialization.to_state_dict(getattr(container, name)) for name in arrays_of(container)}


def with_state(target: Any, state: dict[str, Any]) -> Any:
    """A container like the target, of these arrays."""
    arrays = {
        name: serialization.from_state_dict(getattr(target, name), state[name], name=name) for name in arrays_of(target)
    }
    return dataclasses.replace(target, **arrays)


def arrays_of(container: Any) -> list[str]:
    """The fields that are arrays, or containers of them."""
    return [field.name for field in dataclasses.fields(container) if field.name not in ("n", "k")]
