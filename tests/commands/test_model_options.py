"""Every command that takes an adapter takes the order of its columns; convert-adapter writes PEFT's."""

from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jmoe import gpt_oss
from jmoe.cli import app
from tests import adapter_layouts as layouts

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
CONFIG = gpt_oss.Config.load(CASE / "model")
FLAG = ["--lora-b-layout", "grouped_by_expert"]


@pytest.fixture
def unsloths(tmp_path: Path) -> Path:
    """Experts' columns by expert, and nothing that tells but Unsloth's mark."""
    tensors, settings = layouts.read(CASE / "adapter")
    for layer, factors in layouts.experts_of(tensors, CONFIG.num_local_experts):
        tensors |= layouts.as_parameters(layer, factors, "grouped_by_expert")
    return layouts.write(tmp_path / "unsloths", tensors, settings | {"auto_mapping": {"unsloth_fixed": True}})


@pytest.mark.parametrize("command", ["generate", "eval", "merge", "doctor", "parity", "convert-adapter"])
def test_every_command_with_an_adapter_has_the_flag(command: str) -> None:
    run = CliRunner().invoke(app, [command, "--lora-b-layout", "by_moon"])
    assert run.exit_code == 2
    assert "'by_moon' is not one of 'rank_major', 'grouped_by_expert'" in " ".join(run.output.replace("│", "").split())


def test_merge_and_doctor_read_by_the_flag(unsloths: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(CASE / "model")]
    reports = {}
    for name, adapter in (("theirs", [str(unsloths), *FLAG]), ("pefts", [str(CASE / "adapter")])):
        run = CliRunner().invoke(app, ["merge", *arguments, "--out", str(tmp_path / name), "--adapter", *adapter])
        assert run.exit_code == 0, run.output
        reports[name] = run.stdout.replace(str(tmp_path / name), "")
    assert reports["theirs"] == reports["pefts"]
    for file in sorted((tmp_path / "theirs").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "pefts" / file.name).read_bytes()
    run = CliRunner().invoke(app, ["doctor", *arguments, "--adapter", str(unsloths), *FLAG])
    assert run.exit_code == 0, run.output
    assert "grouped_by_expert, as it was asked for" in run.stdout
    assert "left of D in bf16" in run.stdout


def test_doctor_examines_an_adapter_without_its_model() -> None:
    run = CliRunner().invoke(app, ["doctor", "--adapter", str(CASE / "adapter")])
    assert run.exit_code == 0, run.output
    assert "rank_major, PEFT's order" in run.stdout
    assert "left of D in bf16" not in run.stdout


def test_convert_adapter_writes_what_peft_reads(unsloths: Path, tmp_path: Path) -> None:
    arguments = ["convert-adapter", "--model", str(CASE / "model"), "--adapter", str(unsloths), *FLAG]
    for portable in ([], ["--portable"]):
        out = tmp_path / f"out{len(portable)}"
        run = CliRunner().invoke(app, [*arguments, "--out", str(out), *portable])
        assert run.exit_code == 0, run.output
        got, want = (gpt_oss.load_adapter(folder, CONFIG) for folder in (out, CASE / "adapter"))
        for target, scale in want.scale.items():
            ours, theirs = (np.asarray(lora.scale[target])[0, 0] * np.asarray(lora.b[target]) for lora in (got, want))
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
            assert np.unique(got.scale[target]).tolist() == ([1.0] if portable else [float(scale[0, 0])])
        assert jax.tree.structure(got) == jax.tree.structure(want)
    run = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert isinstance(run.exception, FileExistsError)
    assert "is not empty" in str(run.exception)


def test_merge_refuses_an_order_for_what_was_loaded(tmp_path: Path) -> None:
    lora = gpt_oss.load_adapter(CASE / "adapter", CONFIG)
    with pytest.raises(ValueError, match="lora_b_layout is for a directory, got 'rank_major'"):
        gpt_oss.merge(CASE / "model", lora, tmp_path, lora_b_layout="rank_major", progress=False)
