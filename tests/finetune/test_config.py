"""A run's options: from a file, from flags, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jmoe.cli import app
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.options_file import read_file

NEEDED = {"model": "m", "data": "d", "out": "o"}


def test_options_come_from_toml_and_json(tmp_path: Path) -> None:
    toml, json = tmp_path / "run.toml", tmp_path / "run.json"
    toml.write_text('model = "m"\ndata = "d"\nout = "o"\nrank = 4\nalpha = 8\nschedule = "linear"\n')
    json.write_text('{"model": "m", "data": "d", "out": "o", "rank": 4, "alpha": 8, "schedule": "linear"}')
    config = FinetuneConfig.create(read_file(toml))
    assert config == FinetuneConfig.create(read_file(json))
    assert (config.rank, config.alpha, config.schedule, config.scale) == (4, 8.0, "linear", 2.0)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    assert FinetuneConfig.create({**NEEDED, "rank": 16, "alpha": 8, "rslora": True}).scale == 2.0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"batch": 4}, "unknown options batch; there are model, data"),
        ({"fsdp": True}, "fsdp splits experts over a mesh's data axis, and no mesh is given"),
        ({"ranks": 4}, "ranks must be as gate_up=8,q=16, .* got 4"),
        ({"ranks": "gate=8"}, "'gate' of rank 8 in 'gate=8'"),
        ({"ranks": "q=8,q=4"}, "each once and at least 1, got twice"),
        ({"ranks": "q=0"}, "'q' of rank 0"),
        ({"ranks": "q"}, "'q' of rank ''"),
        ({"ranks": {"q": True}}, "'q' of rank True"),
        ({"ranks": "q=8", "targets": "down"}, "ranks must be of targets, down, got 'q'"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": 0.1, "targets": "gate_up,down"}, "lora_dropout acts on LoRA on attention .* alone"),
        ({"lora_b_layout": "rank_major"}, "no adapter is given"),
        ({"out": ""}, "out must be a name, not empty, got ''"),
        ({"out": " "}, "out must be a name, not empty"),
        ({"model": ""}, "model must be a name, not empty"),
        ({"data": ""}, "data must be names, not empty"),
        ({"data": []}, "data must be names, not empty"),
        ({"data": ["a", ""]}, "data must be names, not empty"),
        ({"data": ["a", 3]}, r"data must be a text or a list of texts, got \['a', 3\]"),
        ({"validation": {"a": 1}}, "validation must be a text or a list of texts"),
        ({"learning_rate": 10**400}, "learning_rate must be below 1.8e308, got a whole number of 1329 bits"),
        ({"steps": 10**400}, "steps must be at most 2147483647, got a whole number of 1329 bits"),
        ({"targets": [10**5000]}, "targets must be one of str, got a list with a number too long to write"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"weight_decay": float("nan")}, "weight_decay must be 0 or more, and finite, got nan"),
        ({"clip": float("inf")}, "clip must be 0 or more, and finite, got inf"),
        ({"rank": "4"}, "rank must be one of int, got '4'"),
        ({"rank": True}, "rank must be one of int, got True"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"schedule": "step"}, "schedule must be one of 'cosine', 'linear', 'constant', got 'step'"),
        ({"targets": "q,z"}, "targets must be some of q, k, v, o, gate_up, down"),
        ({"targets": ""}, "targets must be some of"),
        ({"epochs": float("inf")}, "epochs must be positive and finite, got inf"),
        ({"seed": 2**64}, r"seed must be in \[0, 2\*\*32\), got"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"clip": -1}, "clip must be 0 or more"),
    ],
)
def test_what_does_not_fit_is_named(entries: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig.create({**NEEDED, **entries})


def test_missing_options_are_named() -> None:
    with pytest.raises(ValueError, match="options without a value: data, out"):
        FinetuneConfig.create({"model": "m"})


@pytest.mark.parametrize(("name", "text"), [("run.toml", "rank ="), ("run.json", "{"), ("list.json", "[]")])
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read_file(tmp_path / name)


def test_one_file_or_several_are_read_alike() -> None:
    one = FinetuneConfig.create({**NEEDED, "data": "d"})
    assert one == FinetuneConfig.create({**NEEDED, "data": ["d"]}) == FinetuneConfig(**NEEDED)  # type: ignore[arg-type]
    several = FinetuneConfig.create({**NEEDED, "data": ["d", "e"], "validation": ["v", "w"]})
    assert (several.data, several.validation) == (("d", "e"), ("v", "w"))


def test_targets_and_ranks_may_be_lists_and_tables() -> None:
    flags = FinetuneConfig.create({**NEEDED, "targets": "q,gate_up", "ranks": "gate_up=8, q=4"})
    file = {"targets": ["q", "gate_up"], "ranks": {"gate_up": 8, "q": 4}}
    assert flags == FinetuneConfig.create({**NEEDED, **file})
    assert flags == FinetuneConfig.create({**NEEDED, **file, "ranks": ["gate_up=8", "q=4"]})
    assert flags.lora_ranks == {"q": 4, "gate_up": 8}


def test_a_target_with_a_rank_of_its_own_has_the_scale_of_that_rank() -> None:
    config = FinetuneConfig.create({**NEEDED, "rank": 16, "alpha": 32, "ranks": "q=4", "targets": "q,k"})
    assert (config.lora_ranks, config.lora_scales) == ({"q": 4, "k": 16}, {"q": 8.0, "k": 2.0})
    stabilised = FinetuneConfig.create({**NEEDED, "rank": 16, "alpha": 8, "ranks": "q=4", "rslora": True})
    assert (stabilised.lora_scales["q"], stabilised.lora_scales["k"]) == (4.0, 2.0)


def test_every_option_is_a_flag() -> None:
    help_text = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200"}).output
    for field in dataclasses.fields(FinetuneConfig):
        assert f"--{field.name.replace('_', '-')}" in help_text
    assert "LoRA's rank (default: 16)" in help_text
    assert "<nothing|experts|layers>" in help_text or "[nothing|experts|layers]" in help_text
    assert help_text.count("(required)") == 3
