"""The experiment at its smallest, and what it is made of."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compiled_programs import optimised

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_lora_learns_on_four_bits_what_it_learns_on_sixteen(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "learning_experiment.py", "--size", "ci", "--out", tmp_path]
    environment = optimised() | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    results = json.loads((tmp_path / "results.json").read_text())
    loss, accuracy = results["summary"]["loss"], results["summary"]["accuracy"]
    for kind in ("mxfp4", "bf16"):
        assert loss[kind]["after"] < loss[kind]["base"] - 3
        assert accuracy[kind]["after"] > max(accuracy[kind]["base"], results["chance"]) + 0.08
    assert loss["apart"] < 0.1
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


COMMITTED = pytest.mark.parametrize("file", sorted((EXAMPLES / "learning").glob("*.json")), ids=lambda file: file.stem)


@COMMITTED
def test_the_committed_runs_gained_and_ended_within_noise(file: Path) -> None:
    results = json.loads(file.read_text())
    loss, accuracy = results["summary"]["loss"], results["summary"]["accuracy"]
    for kind in ("mxfp4", "bf16"):
        assert loss[kind]["gain"] > 5
        assert accuracy[kind]["after"] > results["chance"] + 0.4
    assert loss["apart"] <= loss["noise"]
    assert accuracy["apart"] <= accuracy["noise"]


@COMMITTED
def test_the_committed_runs_are_of_these_settings_and_in_the_docs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from learning.report import summary
    from learning.sizes import SIZES

    results = json.loads(file.read_text())
    settings = dataclasses.asdict(SIZES[results["size"]]) | {"seeds": list(SIZES[results["size"]].seeds)}
    assert {name: results["settings"][name] for name in settings} == settings
    assert results["summary"] == summary(results)
    docs = (ROOT / "docs/finetune.md").read_text()
    loss, accuracy = results["summary"]["loss"], results["summary"]["accuracy"]
    for kind, words in (("mxfp4", "MXFP4 experts"), ("bf16", "bf16 experts")):
        for key, row in (("base", "base"), ("after", "with LoRA")):
            assert f"| {words}, {row} | {loss[kind][key]:.4f} | {accuracy[kind][key]:.4f} |" in docs
    assert f"| {loss['apart']:.4f} | {accuracy['apart']:.4f} |" in docs
    assert f"| {loss['noise']:.4f} | {accuracy['noise']:.4f} |" in docs


@pytest.mark.slow
def test_the_whole_model_is_trained_as_gpt_oss_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from learning.pretrain import forward, new_weights
    from learning.sizes import SIZES

    from jmoe.gpt_oss.model import GptOss

    config = SIZES["ci"].config
    keys = iter(jax.random.split(jax.random.key(1), 100))
    # Biases and sinks are zeros and norms are ones in new weights, and would hide a mistake.
    weights = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), new_weights(jax.random.key(0), config)
    )
    tokens = jax.random.randint(next(keys), (2, 40), 0, 256, jnp.int32)
    model = GptOss(config, **weights._asdict(), dtype=jnp.float32)
    logits, _ = forward(weights, tokens, config, jnp.dtype(jnp.float32))
    np.testing.assert_allclose(logits, model(tokens), atol=1e-3)


def test_questions_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from learning.data import CATEGORIES, questions

    train, held_out = questions(64)
    assert len(train) == 56 * len(CATEGORIES)
    assert len(held_out) == 8 * len(CATEGORIES)
    assert not {question.name for question in train} & {question.name for question in held_out}
    example = held_out[0].example
    assert example.tokens[example.trained].tolist() == held_out[0].answer
