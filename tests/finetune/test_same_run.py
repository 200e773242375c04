"""Which options may be others when a run goes on."""

import dataclasses
import json
from pathlib import Path

import pytest

from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.same_run import changed_options

CONFIG = FinetuneConfig(model="m", data="d", out="o")
SAVED = json.loads(json.dumps(dataclasses.asdict(CONFIG)))


@pytest.mark.parametrize(
    "change",
    [
        *({"data": ["d"]}, {"out": "p"}, {"keep": 5}, {"log_every": 7}, {"quiet": True}, {"log_to": "none"}),
        *({"mesh": "data=2"}, {"fsdp": True}),
        *({"steps": 41}, {"epochs": 2.0}, {"patience": 3}),
    ],
)
def test_what_is_shown_kept_or_when_it_ends_may_change(change: dict[str, object]) -> None:
    assert changed_options({**SAVED, **change}, CONFIG) == []


def test_what_decides_what_is_computed_may_not() -> None:
    saved = {**SAVED, "rank": 8, "data": ["d", "e"]}
    assert changed_options(saved, CONFIG) == ["data was ['d', 'e'], is 'd'", "rank was 8, is 16"]
    assert changed_options({**SAVED, "newer": 1}, CONFIG) == ["newer was 1, is None"]


def test_an_option_that_an_earlier_run_did_not_know_had_its_default() -> None:
    saved = {name: value for name, value in SAVED.items() if name not in ("clip", "model")}
    assert changed_options(saved, dataclasses.replace(CONFIG, model="n")) == ["model was None, is 'n'"]
    assert changed_options(saved, dataclasses.replace(CONFIG, clip=2.0))[0] == "clip was 1.0, is 2.0"


def test_a_run_saved_before_there_were_more_options_is_the_same_run() -> None:
    saved = json.loads((Path(__file__).parents[1] / "data" / "finetune_config_2026_11.json").read_text())
    now = dataclasses.replace(CONFIG, steps=7, validation="v")
    assert isinstance(saved["data"], str)
    assert changed_options(saved, now) == []
    assert changed_options(json.loads(json.dumps(dataclasses.asdict(now))), now) == []
