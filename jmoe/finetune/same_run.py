"""Whether the options of a run that goes on are those that it began with."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jmoe.finetune.config import FinetuneConfig

FREE = frozenset({"out", "keep", "checkpoint_every", "log_every", "quiet", "log_to", "mesh", "fsdp"})
"""Options that change nothing that is computed: where the run is kept, how often, what it shows, on which devices."""

LENGTH = frozenset({"steps", "epochs", "patience"})
"""Options that say when a run ends: they may be others when it goes on."""


def changed_options(saved: Mapping[str, Any], config: FinetuneConfig) -> list[str]:
    """Says of each option of a saved run ("rank was 16, is 3") that is another now, but for FREE and LENGTH.

    An option that the saved run does not know, being of an earlier jmoe, had its default; a list of one is its item.
    """
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING  # a required option that is missing was None
    }
    was = {name: comparable(value) for name, value in {**defaults, **saved}.items()}
    now = {name: comparable(value) for name, value in dataclasses.asdict(config).items()}
    names = sorted({*was, *now} - FREE - LENGTH)
    return [f"{name} was {was.get(name)!r}, is {now.get(name)!r}" for name in names if was.get(name) != now.get(name)]


def comparable(value: Any) -> Any:
    """The value as JSON keeps it, a list of one as its item."""
    plain = json.loads(json.dumps(value))
    return plain[0] if isinstance(plain, list) and len(plain) == 1 else plain
