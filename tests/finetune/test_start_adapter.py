"""A run that starts from an adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jmoe import gpt_oss
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.run import finetune
from jmoe.finetune.start_adapter import description, start_adapter
from jmoe.gpt_oss.adapter import load_adapter
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.new_adapter import new_adapter
from jmoe.gpt_oss.save import save_adapter
from jmoe.gpt_oss.weights import LoraWeights

pytestmark = pytest.mark.filterwarnings("ignore:.* is as PEFT reads it, but vLLM")  # ranks differ

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny_gpt_oss"
CONFIG = Config.load(TINY)


def options(adapter: Path, **more: Any) -> FinetuneConfig:
    return FinetuneConfig.create({"model": str(TINY), "data": "d", "out": "o", "adapter": str(adapter), **more})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 4 on gate_up, 2 on q and down, none on k, v and o; q in the second layer alone."""
    path = tmp_path_factory.mktemp("adapter")
    targets = ("q", "gate_up", "down")
    ranks = {"q": 2, "gate_up": 4, "down": 2}
    lora = new_adapter(CONFIG, rank=ranks, scale={"q": 3.0, "gate_up": 2.0, "down": 2.0}, targets=targets, seed=5)
    b = {name: 0.01 * jax.random.normal(jax.random.key(1), factor.shape) for name, factor in lora.b.items()}
    lora.scale["q"] = lora.scale["q"].at[0].set(0)
    save_adapter(path, LoraWeights(lora.a, b, lora.scale))
    return path


def test_its_factors_scales_and_targets_are_kept(adapter: Path) -> None:
    found, wanted = start_adapter(options(adapter), CONFIG), load_adapter(adapter, CONFIG)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(wanted)))
    assert {name: a.shape[-2] for name, a in found.a.items()} == {"q": 2, "gate_up": 4, "down": 2}


def test_masters_are_float32(adapter: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: np.asarray(t.astype(jnp.bfloat16)) for name, t in load_file(file).items()}, file)
    assert {leaf.dtype for leaf in jax.tree.leaves(start_adapter(options(tmp_path), CONFIG))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        ({"rank": 16}, "rank 16"),
        ({"rank": 4}, "rank 4"),
        ({"rank": 2, "ranks": "gate_up=8"}, "ranks gate_up=8"),
        ({"ranks": "v=4"}, "ranks v=4"),
        ({"alpha": 32}, "alpha 32"),
        ({"targets": "q,k"}, "targets q,k"),
        ({"targets": "q,k,v,o,gate_up,down"}, "targets q,k,v,o,gate_up,down"),
        ({"rslora": True}, "rslora"),
    ],
)
def test_options_that_differ_are_an_error_that_says_what_it_has(
    adapter: Path, more: dict[str, object], differs: str
) -> None:
    with pytest.raises(ValueError, match="leave out what differs") as caught:
        start_adapter(options(adapter, **more), CONFIG)
    said = str(caught.value)
    assert "q (rank 2, scale 3 in 1 of 2 layers), gate_up (rank 4, scale 2), down (rank 2, scale 2)" in said
    assert said.endswith(differs)


@pytest.mark.parametrize("more", [{"rank": 2, "ranks": "gate_up=4"}, {"targets": "down,q,gate_up"}])
def test_options_that_agree_with_the_adapter_are_accepted(adapter: Path, more: dict[str, object]) -> None:
    start_adapter(options(adapter, **more), CONFIG)


def test_alpha_agrees_where_every_scale_is_its_quotient(tmp_path: Path) -> None:
    lora = new_adapter(CONFIG, rank=4, scale=2.0, targets=("q",))
    save_adapter(tmp_path, LoraWeights(lora.a, jax.tree.map(jnp.ones_like, lora.b), lora.scale))
    start_adapter(options(tmp_path, alpha=8.0), CONFIG)
    start_adapter(options(tmp_path, alpha=4.0, rslora=True), CONFIG)
    with pytest.raises(ValueError, match="alpha 8 with rslora"):
        start_adapter(options(tmp_path, alpha=8.0, rslora=True), CONFIG)
    with pytest.raises(ValueError, match=r"lora_dropout 0\.1, which acts on attention alone"):
        start_adapter(options(without_attention(tmp_path), lora_dropout=0.1), CONFIG)


def without_attention(path: Path) -> Path:
    lora = new_adapter(CONFIG, rank=4, scale=2.0, targets=("down", "gate_up"))
    save_adapter(path / "experts", LoraWeights(lora.a, jax.tree.map(jnp.ones_like, lora.b), lora.scale))
    return path / "experts"


def test_a_run_does_not_overwrite_what_it_starts_from(adapter: Path, tmp_path: Path) -> None:
    own = shutil.copytree(adapter, tmp_path / "adapter")
    with pytest.raises(ValueError, match="would overwrite"):
        start_adapter(options(own, out=str(tmp_path)), CONFIG)


def test_an_adapter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        start_adapter(options(tmp_path / "nowhere"), CONFIG)


@pytest.mark.slow
def test_a_run_from_an_adapter_begins_where_that_ended_and_keeps_its_scales(adapter: Path, tmp_path: Path) -> None:
    """With a rate that is as good as none, the adapter that is saved is the one that the run started from."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some words to learn, and some more of them"}\n' * 8)
    out = tmp_path / "run"
    run = options(
        adapter, data=str(rows), out=str(out), length=64, steps=2, learning_rate=1e-12, dtype="float32", remat="nothing"
    )
    with (tmp_path / "printed").open("w") as printed:
        finetune(run, Console(file=printed, width=200))
    found, wanted = load_adapter(out / "adapter", CONFIG), load_adapter(adapter, CONFIG)
    for kept, before in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(kept, before, atol=1e-7)
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    base = gpt_oss.load(TINY, dtype=jnp.float32, progress=False)
    assert base.lora is None
    assert losses[0]["validation_loss"] == pytest.approx(losses[-1]["validation_loss"], rel=1e-5)
    assert f"starts from {adapter}: {description(wanted)}" in (tmp_path / "printed").read_text()
