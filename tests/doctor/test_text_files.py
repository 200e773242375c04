"""What doctor says of the files that text needs: one line each, whatever is in them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jmoe.cli import app
from jmoe.device_memory import NAMES
from jmoe.doctor.text_files import TextFile, examine_generation_config, examine_text_files
from tests import harmony

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
NAMED = ("tokenizer.json", "chat template", "generation_config.json")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model")


def found(model: Path) -> dict[str, TextFile]:
    files = examine_text_files(model)
    assert tuple(file.name for file in files) == NAMED
    assert all("\n" not in file.found for file in files)
    return {file.name: file for file in files}


def rewrite(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_files_that_fit_are_no_warning() -> None:
    files = found(TINY)
    assert not any(file.wrong for file in files.values())
    assert files["tokenizer.json"].found == "512 tokens of the model's 512"
    assert files["generation_config.json"].found == "a text ends with any of <|endoftext|>, <|return|>"


BROKEN: list[tuple[str, Callable[[Path], Any], str]] = [
    ("tokenizer.json", lambda model: (model / "tokenizer.json").unlink(), "missing"),
    ("tokenizer.json", lambda model: (model / "tokenizer.json").write_text("{"), "broken: "),
    ("tokenizer.json", lambda model: (model / "tokenizer.json").write_bytes(b""), "broken: "),
    ("tokenizer.json", lambda model: rewrite(model / "config.json", vocab_size=500), "it has token 511, the model 500"),
    ("chat template", lambda model: (model / "chat_template.jinja").unlink(), "missing"),
    ("chat template", lambda model: (model / "chat_template.jinja").write_text("{% if %}"), "broken: "),
    (
        "chat template",
        lambda model: (model / "chat_template.jinja").write_text(""),
        "does not write what the user says",
    ),
    (
        "chat template",
        lambda model: (model / "chat_template.jinja").write_text("{{ raise_exception('no messages today') }}"),
        "broken: .*no messages today",
    ),
    (
        "chat template",
        lambda model: (model / "chat_template.jinja").write_text("{{ messages[0].content }}"),
        "does not write what the assistant says",
    ),
    (
        "chat template",
        lambda model: (model / "chat_template.jinja").write_text(
            (TINY / "chat_template.jinja").read_text().replace("<|message|>", "<|channel|>")
        ),
        r"it writes <\|channel\|>, which the tokenizer does not have",
    ),
    ("generation_config.json", lambda model: (model / "generation_config.json").unlink(), "missing"),
    ("generation_config.json", lambda model: (model / "generation_config.json").write_text("[]"), "broken: "),
    ("generation_config.json", lambda model: (model / "generation_config.json").write_text("{}"), "no eos_token_id"),
    (
        "generation_config.json",
        lambda model: rewrite(model / "generation_config.json", eos_token_id="</s>"),
        "broken: .*must be a token id",
    ),
    (
        "generation_config.json",
        lambda model: rewrite(model / "generation_config.json", eos_token_id=[0, 200002]),
        r"eos_token_id has \[200002\], the model 512",
    ),
    (
        "generation_config.json",
        lambda model: rewrite(model / "generation_config.json", eos_token_id=0),
        r"eos_token_id lacks <\|return\|>",
    ),
]


@pytest.mark.parametrize(("name", "damage", "said"), BROKEN)
def test_what_is_missing_or_broken_is_said(name: str, damage: Callable[[Path], Any], said: str, model: Path) -> None:
    damage(model)
    files = found(model)
    assert files[name].wrong
    assert re.search(said, files[name].found), files[name].found
    assert not any(files[other].wrong for other in NAMED if other != name)


def test_without_a_tokenizer_the_template_is_looked_for(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert found(model)["chat template"].found == "not tried, for want of a tokenizer"
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    assert found(model)["chat template"].found.startswith("missing")
    rewrite(model / "tokenizer_config.json", chat_template=template)
    assert found(model)["chat template"].found == "not tried, for want of a tokenizer"


def test_gpt_oss_own_files_fit(harmony_tokenizer: Any, tmp_path: Path) -> None:
    model = harmony.make_directory(tmp_path / "model")
    (model / "config.json").write_text(json.dumps({"vocab_size": 201088}))
    file = model / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [200002, 199999, 200012]}))
    assert not any(each.wrong for each in found(model).values())
    for stop, said in (
        (200002, "lacks <|call|>: "),
        ([199999], "lacks <|return|> and <|call|>: "),
        ([200002, 200012, 200007], "has <|end|>, which ends a reply after its analysis"),
    ):
        file.write_text(json.dumps({"eos_token_id": stop}))
        examined = examine_generation_config(model, harmony_tokenizer, 201088)
        assert examined.wrong
        assert said in examined.found


@pytest.mark.parametrize("gone", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_model_without_them_loads_and_doctor_exits_with_zero(
    gone: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    (model / gone).unlink()
    run = CliRunner().invoke(app, ["doctor", "--model", str(model)])
    assert run.exit_code == 0, run.output
    named = "chat template" if gone == "chat_template.jinja" else gone
    assert f"warning: {named}: missing" in run.output
