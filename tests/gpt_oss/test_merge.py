"""A merged checkpoint is the model with its adapter, for jmoe and for transformers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GptOssForCausalLM

from jmoe import dequantize, gpt_oss, quantize
from jmoe.checkpoint import Checkpoint, load_moe_layer

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, gpt_oss.MergeReport]:
    out = tmp_path_factory.mktemp("merged") / "model"
    return out, gpt_oss.merge(CASE / "model", CASE / "adapter", out, progress=False)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_transformers_and_jmoe_read_the_model_with_its_adapter(written: tuple[Path, gpt_oss.MergeReport]) -> None:
    out, _ = written
    with np.load(CASE / "expected.npz") as arrays:
        tokens, want, base = (arrays[name] for name in ("input_ids", "adapter_logits", "base_logits"))
    theirs, loading = GptOssForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.no_grad():
        of_torch = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    ours = gpt_oss.load(out, dtype=jnp.float32, progress=False)(tokens)
    rounding = relative(of_torch, want)
    assert rounding <= 2e-2
    assert rounding <= 0.1 * relative(base, want)
    assert relative(ours, of_torch) <= 1e-3


def test_weights_are_the_sums_rounded_once(written: tuple[Path, gpt_oss.MergeReport]) -> None:
    out, report = written
    source, merged = Checkpoint(CASE / "model"), Checkpoint(out)
    lora = gpt_oss.load_adapter(CASE / "adapter", gpt_oss.Config.load(CASE / "model"))
    for layer in range(2):
        before, after = load_moe_layer(source, layer).experts, load_moe_layer(merged, layer).experts
        weights = {
            target: np.asarray(dequantize(getattr(before, target)), np.float64) for target in ("gate_up", "down")
        }
        weights["q"] = source.tensor(f"model.layers.{layer}.self_attn.q_proj.weight").astype(np.float64)
        got = {"gate_up": after.gate_up, "down": after.down}
        got["q"] = merged.tensor(f"model.layers.{layer}.self_attn.q_proj.weight")
        for target, weight in weights.items():
            a, b = (np.asarray(factor[target][layer, 0], np.float64) for factor in (lora.a, lora.b))
            delta = float(lora.scale[target][layer, 0]) * (b @ a)
            np.testing.assert_allclose(np.asarray(got[target], np.float64), weight + delta, rtol=2**-8, atol=1e-6)
            (row,) = (row for row in report.rows if (row.layer, row.target) == (layer, target))
            assert row.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
            if target == "q":
                assert row.mxfp4 is None
                continue
            again = np.asarray(dequantize(quantize(jnp.asarray(weight + delta, jnp.float32))), np.float64)
            error = np.linalg.norm(again - weight - delta) / np.linalg.norm(delta)
            assert row.mxfp4.error == pytest.approx(error, rel=1e-3)
            assert row.mxfp4.survives == pytest.approx(np.sum((again - weight) * delta) / np.sum(delta**2), rel=1e-3)
            assert row.bfloat16.error < row.mxfp4.error
            assert row.bfloat16.survives == pytest.approx(1, abs=0.01)


def test_the_directory_is_a_dense_checkpoint(written: tuple[Path, gpt_oss.MergeReport]) -> None:
    out, report = written
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    checkpoint = Checkpoint(out)
    specs = {name: checkpoint.spec(name) for name in index["weight_map"]}
    assert {spec.dtype for spec in specs.values()} == {"BF16"}
    assert specs["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 64, 192)
    assert index["metadata"]["total_size"] == sum(2 * int(np.prod(spec.shape)) for spec in specs.values())
    assert len(report.rows) == 12
    assert len(str(report).splitlines()) == 13


def test_a_faint_delta_is_less_than_mxfp4s_rounding(tmp_path: Path) -> None:
    config = gpt_oss.Config.load(CASE / "model")
    lora = gpt_oss.load_adapter(CASE / "adapter", config)
    faint = gpt_oss.LoraWeights(lora.a, jax.tree.map(lambda leaf: 1e-4 * leaf, lora.b), lora.scale)
    both = gpt_oss.stack_adapters([lora, faint])
    report = gpt_oss.merge(CASE / "model", both, tmp_path, adapter_index=1, progress=False)
    rows = [row for row in report.rows if row.mxfp4 is not None]
    assert len(rows) == 4
    # Above 1 too: a block whose largest value falls below a power of two gets a finer scale, in which it saturates.
    assert all(row.mxfp4.error >= 0.9 for row in rows)
    assert all(row.bfloat16.error < row.mxfp4.error for row in rows)


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    config = gpt_oss.Config.load(CASE / "model")
    lora = gpt_oss.load_adapter(CASE / "adapter", config)
    with pytest.raises(ValueError, match=r"adapter_index must be in \[0, 1\), got 1"):
        gpt_oss.merge(CASE / "model", lora, tmp_path / "out", adapter_index=1, progress=False)
    with pytest.raises(ValueError, match=r"LoRA on q must be for \(layers, ..., N, K\) "):
        gpt_oss.merge(TINY, lora, tmp_path / "out", progress=False)
    huge = gpt_oss.LoraWeights(*({**part, "down": 1e25 * part["down"]} for part in (lora.a, lora.b)), lora.scale)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj is not finite in bfloat16"):
        gpt_oss.merge(CASE / "model", huge, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    (tmp_path / "out" / "something").write_text("")
    with pytest.raises(FileExistsError, match="out is not empty"):
        gpt_oss.merge(CASE / "model", lora, tmp_path / "out", progress=False)


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from jmoe.cli import app

    arguments = ["merge", "--model", TINY, "--adapter", TINY / "adapter", "--out", tmp_path / "out"]
    run = CliRunner().invoke(app, list(map(str, arguments)))
    assert run.exit_code == 0, run.output
    assert "gate_up" in run.output
    assert gpt_oss.Config.load(tmp_path / "out").num_hidden_layers == 2
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", TINY))
    assert ours("some text") == theirs("some text")
    assert ours.chat_template == theirs.chat_template
