"""What is said of an adapter's files, and how much of its changes a sum in bfloat16 leaves."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import GptOssForCausalLM, Mxfp4Config

from jmoe import gpt_oss
from jmoe.checkpoint import Checkpoint
from jmoe.gpt_oss.adapter_report import AdapterReport, TargetReport, examine_adapter, spread
from tests import adapter_layouts as layouts

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
CONFIG = gpt_oss.Config.load(CASE / "model")
TENSORS, SETTINGS = layouts.read(CASE / "adapter")

# transformers 5.23 asks torch modules for an attribute that it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def of(report: AdapterReport, target: str) -> TargetReport:
    return next(row for row in report.targets if row.target == target)


def examined(folder: Path) -> AdapterReport:
    return examine_adapter(folder, Checkpoint(CASE / "model"), CONFIG)


def test_ranks_scales_dtypes_layers_and_sizes_are_the_files(tmp_path: Path) -> None:
    tensors = {key: value for key, value in TENSORS.items() if "1.self_attn.q_proj" not in key}
    tensors |= {key: value.astype(np.float16) for key, value in tensors.items() if "v_proj" in key}
    entries = {"alpha_pattern": {"layers.1.self_attn.k_proj": 14}, "layers_to_transform": None}
    modules = ["layers.0.self_attn.q_proj", "k_proj", "v_proj", "o_proj"]
    folder = layouts.write(tmp_path, tensors, SETTINGS | entries | {"target_modules": modules})
    with_model, alone = examined(folder), examine_adapter(folder)
    lora = gpt_oss.load_adapter(folder, CONFIG)
    for report in (with_model, alone):
        assert of(report, "q").layers == (1, 2)
        assert of(report, "k").scales == (3.5, 7.0)
        assert (of(report, "v").dtypes, of(report, "down").dtypes) == (("F16",), ("F32",))
        assert of(report, "gate_up").ranks == (2,)
        assert report.size == sum(leaf.nbytes for leaf in jax.tree.leaves(lora))
        norms = gpt_oss.delta_report(lora).norms["down"]
        np.testing.assert_allclose(of(report, "down").norm, np.linalg.norm(norms), rtol=1e-5)
    assert of(alone, "down").in_bfloat16 is None
    assert with_model.facts == alone.facts


def test_what_is_left_in_bfloat16_is_what_pefts_sum_leaves(tmp_path: Path) -> None:
    """PEFT's forward pass takes W + D in the weight's dtype; beside it an adapter as small as bf16's last bits."""
    small = {key: value * np.float32(2e-3) if "lora_B" in key else value for key, value in TENSORS.items()}
    folder = layouts.write(tmp_path, small, SETTINGS)
    lora = gpt_oss.load_adapter(folder, CONFIG)
    base = GptOssForCausalLM.from_pretrained(
        CASE / "model", dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True), device_map="cpu"
    )
    weights = [layer.mlp.experts.down_proj.detach() for layer in base.model.layers]
    theirs = PeftModel.from_pretrained(base, folder).base_model.model.model.layers
    exact, along = 0.0, 0.0
    for index, (layer, weight) in enumerate(zip(theirs, weights, strict=True)):
        summed = weight + layer.mlp.experts.get_delta_weight("default").detach()
        assert summed.dtype == torch.bfloat16
        a, b = (np.asarray(factors["down"][index, 0], np.float64) for factors in (lora.a, lora.b))
        delta = 3.5 * (b @ a).swapaxes(1, 2)
        exact += float((delta**2).sum())
        along += float(((summed - weight).double().numpy() * delta).sum())
    rounding = of(examined(folder), "down").in_bfloat16
    assert rounding is not None
    # PEFT rounds D itself too, in which a few sums fall to the other side.
    assert rounding.bfloat16.survives == pytest.approx(along / exact, abs=3e-3)
    assert 0 < rounding.bfloat16.survives < 0.99
    large = of(examined(CASE / "adapter"), "down")
    assert large.in_bfloat16 is not None
    assert large.in_bfloat16.bfloat16.survives == pytest.approx(1, abs=1e-3)


def test_sizes_of_deltas_are_held_against_the_weights() -> None:
    lora = gpt_oss.load_adapter(CASE / "adapter", CONFIG)
    report = examined(CASE / "adapter")
    delta = np.asarray(lora.scale["q"])[:, 0, None, None] * np.asarray(lora.b["q"] @ lora.a["q"])[:, 0]
    checkpoint = Checkpoint(CASE / "model")
    weights = [checkpoint.tensor(f"model.layers.{layer}.self_attn.q_proj.weight") for layer in range(2)]
    want = np.linalg.norm(delta) / np.linalg.norm(np.asarray(weights, np.float32))
    assert of(report, "q").relative == pytest.approx(want, rel=1e-4)


GROUPED = {
    key: layouts.columns(value.reshape(value.shape[0], -1, 4).transpose(2, 0, 1), "grouped_by_expert")
    if ".experts." in key and "lora_B" in key
    else value
    for key, value in TENSORS.items()
}
MARK = {"auto_mapping": {"unsloth_fixed": True}}


def test_the_order_of_columns_is_said_and_how_it_was_told(tmp_path: Path) -> None:
    def said(name: str, asked: gpt_oss.LoraBLayout | None = None, **entries: object) -> str:
        folder = layouts.write(tmp_path / name, GROUPED, SETTINGS | entries)
        return examine_adapter(folder, lora_b_layout=asked).facts["columns of lora_B"]

    assert said("key", lora_B_layout="grouped_by_expert") == "grouped_by_expert, as adapter_config.json says"
    assert said("asked", "grouped_by_expert").startswith("grouped_by_expert, as it was asked for")
    assert said("plain").startswith("rank_major, PEFT's order")
    with pytest.warns(gpt_oss.AdapterWarning, match="unsloth_fixed"):
        assert "Unsloth, whose mark it has, may have grouped it by expert" in said("mark", **MARK)


def test_forms_of_keys_shared_factors_and_swapped_axes_are_said(tmp_path: Path) -> None:
    shared, swapped = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for layer, factors in layouts.experts_of(TENSORS, 4):
        (a, b), down = factors["gate_up"], factors["down"]
        shared |= layouts.as_stacked(layer, {"gate_up": (a[:1], b), "down": down})
        turned = {target: (b.swapaxes(1, 2), a.swapaxes(1, 2)) for target, (a, b) in factors.items()}
        swapped |= layouts.as_parameters(layer, turned, "rank_major")
    entries = SETTINGS | {"target_modules": []}
    facts = examine_adapter(layouts.write(tmp_path / "shared", shared, entries)).facts
    assert facts["shared by all experts"] == "lora_A of gate_up"
    assert facts["experts' keys"] == "mlp.experts.gate_up_proj, all experts in one tensor"
    assert facts["columns of lora_B"] == "in no order that could be mistaken"
    facts = examine_adapter(layouts.write(tmp_path / "swapped", swapped, entries)).facts
    assert facts["axes"].startswith("in and out exchanged")


def test_axes_that_nothing_tells_are_said(tmp_path: Path) -> None:
    """Both projections' shapes fit one of the ways only; a square one's fit both."""
    square = {
        f"{layouts.PREFIX}0.mlp.experts.lora_A.weight": np.ones((8, 64), np.float32),
        f"{layouts.PREFIX}0.mlp.experts.lora_B.weight": np.ones((64, 8), np.float32),
    }
    entries = SETTINGS | {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    with pytest.warns(gpt_oss.AdapterWarning):
        facts = examine_adapter(layouts.write(tmp_path / "square", square, entries)).facts
    assert facts["axes"] == "read as most PEFT have them; shapes fit in and out exchanged as well"


def test_samples_are_first_last_and_between() -> None:
    assert [spread(range(24), 3), spread(range(32), 4)] == [[0, 12, 23], [0, 10, 21, 31]]
    assert [spread([5], 3), spread([], 3), spread([2, 7], 4)] == [[5], [], [2, 7]]


def test_factors_of_two_dtypes_are_not_rounded_to_the_narrower(tmp_path: Path) -> None:
    tensors = {key: value.astype(ml_dtypes.bfloat16) if "lora_A" in key else value for key, value in TENSORS.items()}
    lora = gpt_oss.load_adapter(layouts.write(tmp_path, tensors, SETTINGS), CONFIG)
    whole = gpt_oss.load_adapter(CASE / "adapter", CONFIG)
    assert {factor.dtype for factor in lora.a.values()} == {jnp.dtype(jnp.bfloat16)}
    for target, b in whole.b.items():
        np.testing.assert_array_equal(lora.b[target], b)
        np.testing.assert_array_equal(gpt_oss.stack_adapters([lora, lora]).b[target][:, 1:], b)
