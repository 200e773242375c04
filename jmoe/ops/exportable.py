"""Containers that exported functions take and return: registered where they are defined, so that whoever holds one can
load a function of it."""

import json

import jax.export


def exportable[Container](container: type[Container]) -> type[Container]:
    """Lets jax.export write and read functions of `container`, a pytree whose static fields JSON can hold."""
    jax.export.register_pytree_node_serialization(
        container,
        serialized_name=f"jmoe.{container.__name__}",
        serialize_auxdata=lambda auxdata: json.dumps(auxdata).encode(),
        deserialize_auxdata=lambda raw: tuple(json.loads(raw)),
    )
    return container
