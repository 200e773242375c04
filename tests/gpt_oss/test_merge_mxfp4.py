"""A merged checkpoint whose experts are MXFP4 again, in OpenAI's layout."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import GptOssForCausalLM
from typer.testing import CliRunner

from jmoe import Mxfp4, dequantize, gpt_oss, quantize
from jmoe.checkpoint import Checkpoint, load_moe_layer
from jmoe.cli import app
from jmoe.gpt_oss.merge import QUANTIZATION, Format, settings
from jmoe.nn.variables import Frozen, variables_of
from tests.checkpoints import dense, tensors_of
from tests.checkpoints import written as written_checkpoint

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, gpt_oss.MergeReport]:
    out = tmp_path_factory.mktemp("merged") / "model"
    return out, gpt_oss.merge(CASE / "model", CASE / "adapter", out, format="mxfp4", progress=False)


def expected(layer: int, target: str) -> Mxfp4:
    """The sum of weight and delta, in float32, rounded to MXFP4."""
    weight = getattr(load_moe_layer(Checkpoint(CASE / "model"), layer).experts, target)
    lora = gpt_oss.load_adapter(CASE / "adapter", gpt_oss.Config.load(CASE / "model"))
    a, b, scale = lora.a[target][layer, 0], lora.b[target][layer, 0], lora.scale[target][layer, 0]
    delta = scale * jnp.matmul(b.astype(jnp.float32), a.astype(jnp.float32), precision="highest")
    return quantize(dequantize(weight, jnp.float32) + delta)


def test_experts_are_the_sums_rounded_once_and_reported(written: tuple[Path, gpt_oss.MergeReport]) -> None:
    out, report = written
    assert report.format == "mxfp4"
    for layer in range(2):
        before = load_moe_layer(Checkpoint(CASE / "model"), layer).experts
        after = load_moe_layer(Checkpoint(out), layer).experts
        for target in ("gate_up", "down"):
            got, want = (
                np.asarray(dequantize(q, jnp.float32)) for q in (getattr(after, target), expected(layer, target))
            )
            # The delta is summed in another order here, which moves a few values over a midpoint.
            assert (got == want).mean() >= 0.999
            (row,) = (row for row in report.rows if (row.layer, row.target) == (layer, target))
            assert report.written(row) == row.mxfp4
            weight = np.asarray(dequantize(getattr(before, target), jnp.float32), np.float64)
            error = np.linalg.norm(got - np.asarray(exact_sum(layer, target)))
            assert row.mxfp4.error == pytest.approx(error / row.norm, rel=1e-3)
            kept = np.sum((got - weight) * (exact_sum(layer, target) - weight)) / row.norm**2
            assert row.mxfp4.survives == pytest.approx(kept, rel=1e-3)


def exact_sum(layer: int, target: str) -> np.ndarray:
    """Weight and delta in float64."""
    weight = getattr(load_moe_layer(Checkpoint(CASE / "model"), layer).experts, target)
    lora = gpt_oss.load_adapter(CASE / "adapter", gpt_oss.Config.load(CASE / "model"))
    a, b = (np.asarray(factor[target][layer, 0], np.float64) for factor in (lora.a, lora.b))
    return np.asarray(dequantize(weight, jnp.float32), np.float64) + float(lora.scale[target][layer, 0]) * (b @ a)


def test_transformers_and_jmoe_compute_with_the_bytes_written(written: tuple[Path, gpt_oss.MergeReport]) -> None:
    out, _ = written
    with np.load(CASE / "expected.npz") as arrays:
        tokens, base, adapted = (arrays[name] for name in ("input_ids", "base_logits", "adapter_logits"))
    # As a user loads it: on a machine without a GPU transformers dequantises.
    theirs, loading = GptOssForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.no_grad():
        of_torch = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    model = gpt_oss.load(out, dtype=jnp.float32, progress=False)
    ours = np.asarray(model(tokens))
    assert np.linalg.norm(ours - of_torch) <= 1e-3 * np.linalg.norm(of_torch)
    # The same weights in memory, dense: no other bytes, no other order, give these logits.
    layers = model.stack
    dense = jax.tree.map(
        lambda leaf: dequantize(leaf, jnp.float32) if isinstance(leaf, Mxfp4) else leaf,
        layers,
        is_leaf=lambda leaf: isinstance(leaf, Mxfp4),
    )
    model.layers = nnx.data(variables_of(Frozen, dense))
    assert np.linalg.norm(ours - model(tokens)) <= 1e-5 * np.linalg.norm(ours)
    # And they are nearer to the adapter's than the model without it is, by what MXFP4 lets through.
    assert np.linalg.norm(ours - adapted) < 0.9 * np.linalg.norm(base - adapted)


def test_the_directory_is_in_openais_layout(written: tuple[Path, gpt_oss.MergeReport]) -> None:
    out, _ = written
    source, merged = (json.loads((folder / "config.json").read_text()) for folder in (CASE / "model", out))
    assert merged == source
    names = set(Checkpoint(CASE / "model").names)
    checkpoint = Checkpoint(out)
    assert set(checkpoint.names) == names
    assert all(checkpoint.spec(name) == Checkpoint(CASE / "model").spec(name) for name in names)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(checkpoint.tensor(name).nbytes for name in names)


def test_experts_that_the_adapter_leaves_alone_keep_their_bytes(tmp_path: Path) -> None:
    config = gpt_oss.Config.load(CASE / "model")
    lora = gpt_oss.load_adapter(CASE / "adapter", config)
    one_layer = {**lora.scale, "gate_up": lora.scale["gate_up"].at[1].set(0)}
    a, b, scale = ({name: part[name] for name in ("q", "gate_up")} for part in (lora.a, lora.b, one_layer))
    report = gpt_oss.merge(CASE / "model", gpt_oss.LoraWeights(a, b, scale), tmp_path, format="mxfp4", progress=False)
    assert [(row.layer, row.target) for row in report.rows] == [(0, "q"), (0, "gate_up"), (1, "q")]
    before, after = Checkpoint(CASE / "model"), Checkpoint(tmp_path)
    for name in before.names:
        touched = name in (
            "model.layers.0.mlp.experts.gate_up_proj_blocks",
            "model.layers.0.mlp.experts.gate_up_proj_scales",
        )
        if not touched and "q_proj.weight" not in name:
            np.testing.assert_array_equal(after.tensor(name), before.tensor(name))


@pytest.mark.filterwarnings("ignore::jmoe.checkpoint.config_file.CheckpointWarning")
def test_a_dense_checkpoint_in_float32_becomes_mxfp4(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    gpt_oss.merge(CASE / "model", CASE / "adapter", dense, progress=False)
    for file in dense.glob("*.safetensors"):
        save_file({name: tensor.astype(np.float32) for name, tensor in load_file(file).items()}, file)
    entries = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(entries | {"dtype": "float32"}))
    config = gpt_oss.Config.load(dense)
    lora = gpt_oss.load_adapter(CASE / "adapter", config)
    only_q = gpt_oss.LoraWeights(*({"q": part["q"]} for part in (lora.a, lora.b, lora.scale)))
    gpt_oss.merge(dense, only_q, tmp_path / "out", format="mxfp4", progress=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    after = Checkpoint(tmp_path / "out")
    assert {after.spec(name).dtype for name in after.names} == {"BF16", "U8"}
    assert written["quantization_config"] == QUANTIZATION
    want = quantize(jnp.swapaxes(jnp.asarray(Checkpoint(dense).tensor("model.layers.1.mlp.experts.down_proj")), 1, 2))
    got = load_moe_layer(Checkpoint(tmp_path / "out"), 1).experts.down
    np.testing.assert_array_equal(got.blocks, want.blocks)
    np.testing.assert_array_equal(got.scales, want.scales)


@pytest.mark.parametrize("format", ["mxfp4", "bfloat16"])
def test_layers_may_be_packed_and_dense(format: Format, tmp_path: Path) -> None:
    """Each layer is merged by itself, so that nothing asks for one form; loading what was merged does not either."""
    packed = tensors_of(CASE / "model")
    experts = {name: tensor for name, tensor in dense(packed).items() if name.endswith("s.gate_up_proj")}
    mixed = {name: tensor for name, tensor in packed.items() if "layers.1.mlp.experts.gate_up_proj_" not in name}
    mixed["model.layers.1.mlp.experts.gate_up_proj"] = experts["model.layers.1.mlp.experts.gate_up_proj"]
    mixed["model.layers.1.mlp.experts.gate_up_proj_bias"] = packed["model.layers.1.mlp.experts.gate_up_proj_bias"]
    model = written_checkpoint(tmp_path / "mixed", mixed)
    (model / "tokenizer-notes").mkdir()  # what is not a file of a tokenizer is none to copy
    gpt_oss.merge(model, CASE / "adapter", tmp_path / "out", format=format, progress=False)
    gpt_oss.merge(CASE / "model", CASE / "adapter", tmp_path / "want", format=format, progress=False)
    got, want = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "want")
    assert got.names == want.names
    for name in want.names:
        np.testing.assert_array_equal(got.tensor(name), want.tensor(name))


def test_the_config_of_openais_own_layout_is_written_in_hugging_faces_names(tmp_path: Path) -> None:
    own = {"num_hidden_layers": 2, "num_experts": 4, "experts_per_token": 2, "vocab_size": 128, "hidden_size": 64}
    own |= {"intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    own |= {"sliding_window": 16, "initial_context_length": 4096, "rope_theta": 150000, "swiglu_limit": 7.0}
    own |= {"rope_scaling_factor": 32.0, "rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0}
    (tmp_path / "config.json").write_text(json.dumps(own))
    entries = settings(tmp_path, "mxfp4")
    assert entries["quantization_config"] == QUANTIZATION
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert gpt_oss.Config.load(tmp_path).num_local_experts == 4
    (tmp_path / "config.json").write_text(json.dumps(entries | {"quantization_config": "mxfp4"}))
    assert settings(tmp_path, "mxfp4")["quantization_config"] == QUANTIZATION


def narrow(folder: Path) -> Path:
    """The tiny case, dense, with 40 intermediate values, which are no whole blocks."""
    gpt_oss.merge(CASE / "model", CASE / "adapter", folder, progress=False)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "gate_up_proj" in name:
                tensors[name] = tensor[..., :80]
            elif name.endswith("experts.down_proj"):
                tensors[name] = tensor[:, :40]
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(entries | {"intermediate_size": 40}))
    return folder


def test_widths_without_whole_blocks_are_merged_in_bfloat16_alone(tmp_path: Path) -> None:
    model = narrow(tmp_path / "narrow")
    a = {"down": jnp.ones((2, 1, 4, 2, 40))}
    b = {"down": jnp.ones((2, 1, 4, 64, 2))}
    lora = gpt_oss.LoraWeights(a, b, {"down": jnp.ones((2, 1))})
    with pytest.raises(ValueError, match=r"'mxfp4' packs blocks of 32 values, so intermediate_size .* got 40"):
        gpt_oss.merge(model, lora, tmp_path / "mxfp4", format="mxfp4", progress=False)
    assert not (tmp_path / "mxfp4").exists()
    report = gpt_oss.merge(model, lora, tmp_path / "bfloat16", progress=False)
    assert [row.mxfp4 for row in report.rows] == [None, None]


def test_what_cannot_be_written_in_mxfp4(tmp_path: Path) -> None:
    lora = gpt_oss.load_adapter(CASE / "adapter", gpt_oss.Config.load(CASE / "model"))
    with pytest.raises(ValueError, match="format must be 'bfloat16' or 'mxfp4', got 'fp8'"):
        gpt_oss.merge(CASE / "model", lora, tmp_path / "out", format="fp8", progress=False)  # type: ignore[arg-type]
    huge = gpt_oss.LoraWeights(*({**part, "down": 1e25 * part["down"]} for part in (lora.a, lora.b)), lora.scale)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj is not finite in MXFP4"):
        gpt_oss.merge(CASE / "model", huge, tmp_path / "out", format="mxfp4", progress=False)


def test_the_command_says_where_rounding_is_larger_than_the_delta(tmp_path: Path) -> None:
    def merge(adapter: Path, out: str) -> str:
        arguments = ["merge", "--model", TINY, "--adapter", adapter, "--out", tmp_path / out, "--format", "mxfp4"]
        run = CliRunner().invoke(app, list(map(str, arguments)))
        assert run.exit_code == 0, run.output
        assert "experts in MXFP4, everything else in bfloat16" in run.output
        return run.output

    assert "warning" not in merge(TINY / "adapter", "strong")
    faint = shutil.copytree(TINY / "adapter", tmp_path / "faint")
    tensors = load_file(faint / "adapter_model.safetensors")
    smaller = {name: tensor / 8 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(smaller, faint / "adapter_model.safetensors")
    assert "warning: in 4 of 12 weights that the adapter changes, rounding" in merge(faint, "faint-merged")
