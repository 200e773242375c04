"""GET /v1/models: what requests may name as `model`."""

from typing import Any

from jmoe.serve.service import Service


def model_cards(service: Service) -> list[dict[str, Any]]:
    """The base model, the first, and the adapters."""
    base = service.model.names[0]
    names = [*service.model.names, *service.engine.adapters()]
    return [
        {
            "id": name,
            "object": "model",
            "created": service.model.created,
            "owned_by": "jmoe",
            "root": service.model.root if name in service.model.names else name,
            "parent": None if name in service.model.names else base,
            "max_model_len": service.model.max_model_len,
        }
        for name in names
    ]


def model_card(service: Service, name: str) -> dict[str, Any]:
    """One of them.

    Raises:
      ApiError: 404, there is none of this name.
    """
    service.adapter(name)
    return next(card for card in model_cards(service) if card["id"] == name)
