"""What an adapter changes: beside PEFT's own deltas, and what is odd about one."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import GptOssForCausalLM, Mxfp4Config

from jmoe import gpt_oss

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
PREFIX = "base_model.model.model.layers."
GATE_UP, DOWN = "mlp.experts.base_layer.lora_", "mlp.experts.lora_"

type Change = Callable[[dict[str, np.ndarray]], None]


def config() -> gpt_oss.Config:
    return gpt_oss.Config.load(CASE / "model")


def deltas(lora: gpt_oss.LoraWeights, target: str, layer: int) -> np.ndarray:
    """s B A of one layer, [(E,) N, K]."""
    a, b = (np.asarray(factor[target][layer, 0], np.float64) for factor in (lora.a, lora.b))
    return float(lora.scale[target][layer, 0]) * (b @ a)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_every_delta_is_pefts_own() -> None:
    base = GptOssForCausalLM.from_pretrained(
        CASE / "model", dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), device_map="cpu"
    )
    theirs = PeftModel.from_pretrained(base, CASE / "adapter").base_model.model.model.layers
    lora = gpt_oss.load_adapter(CASE / "adapter", config())
    report = gpt_oss.delta_report(lora)
    for layer, module in enumerate(theirs):
        of_targets = {name: getattr(module.self_attn, f"{name}_proj") for name in "qkvo"}
        of_targets |= {"gate_up": module.mlp.experts.base_layer, "down": module.mlp.experts}
        for target, wrapper in of_targets.items():
            want = wrapper.get_delta_weight("default").detach().numpy()
            want = want.swapaxes(1, 2) if want.ndim == 3 else want  # experts are (E, in, out)
            got = deltas(lora, target, layer)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
            norms = np.linalg.norm(want.astype(np.float64), axis=(-2, -1))
            np.testing.assert_allclose(report.norms[target][layer], norms, rtol=1e-5)
            if target == "gate_up":
                for half, of_half in enumerate((report.gate, report.up)):
                    norms = np.linalg.norm(want[:, half::2].astype(np.float64), axis=(-2, -1))
                    np.testing.assert_allclose(of_half[layer], norms, rtol=1e-5)


def test_small_factors_are_not_lost() -> None:
    a, b = jnp.full((1, 1, 1, 4), 1e-25), jnp.full((1, 1, 9, 1), 1e-10)
    report = gpt_oss.delta_report(gpt_oss.LoraWeights({"q": a}, {"q": b}, {"q": jnp.ones((1, 1))}))
    np.testing.assert_allclose(report.norms["q"], [6e-35], rtol=1e-5)


def test_the_report_is_a_table_of_one_adapter() -> None:
    lora = gpt_oss.load_adapter(CASE / "adapter", config())
    both = gpt_oss.stack_adapters([jax.tree.map(lambda leaf: 2 * leaf, lora), lora])
    report = gpt_oss.delta_report(both, adapter=1)
    for target, norms in gpt_oss.delta_report(lora).norms.items():
        np.testing.assert_allclose(report.norms[target], norms, rtol=1e-5)
    text = str(report)
    assert re.search(r"layer +q +k +v +o +gate_up +down\n +0 +\d\.\d{3}e[+-]\d+ .* to ", text)
    with pytest.raises(ValueError, match=r"adapter must be in \[0, 2\), got 2"):
        gpt_oss.delta_report(both, adapter=2)


def changed(folder: Path, change: Change) -> Path:
    """The adapter with its tensors changed."""
    shutil.copytree(CASE / "adapter", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def zero(rows: slice | tuple[slice, slice], *parts: str) -> Change:
    """Zeros in part of the tensors whose names hold all of these."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for key in tensors:
            if all(part in key for part in parts):
                tensors[key][rows] = 0

    return change


ALL, EVEN, ODD = slice(None), slice(0, None, 2), slice(1, None, 2)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_that_changes_nothing_is_an_error(factor: str, tmp_path: Path) -> None:
    folder = changed(tmp_path / "adapter", zero(ALL, factor))
    with pytest.raises(ValueError, match=r"adapter/adapter_model.safetensors changes nothing"):
        gpt_oss.load_adapter(folder, config())


def without(*parts: str) -> Change:
    """No tensors whose names hold one of these."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if any(part in key for part in parts)]:
            del tensors[key]

    return change


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (without("0.self_attn.q_proj"), "model.layers.0.self_attn.q_proj"),
        (without("1.mlp"), "model.layers.1.mlp.experts.gate_up_proj, model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_targets_without_tensors_are_warned_of(change: Change, names: str, tmp_path: Path) -> None:
    folder = changed(tmp_path / "adapter", change)
    with pytest.warns(gpt_oss.AdapterWarning) as caught:
        gpt_oss.load_adapter(folder, config())
    assert f"adapter_model.safetensors has no tensors of {names}, though adapter_config.json has LoRA there" in str(
        caught[0].message
    )


@pytest.mark.parametrize(
    ("entries", "warned"),
    [
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": r".*\.(q|k)_proj"}, True),
        ({"target_modules": r".*\.k_proj"}, False),
        ({"layers_to_transform": 1}, False),
        ({"layers_to_transform": [0]}, True),
        ({"exclude_modules": ["q_proj"]}, False),
        ({"exclude_modules": r".*\.1\..*"}, True),
    ],
)
def test_targets_are_by_pefts_rules(entries: dict[str, object], warned: bool, tmp_path: Path) -> None:
    folder = changed(tmp_path / "adapter", without("0.self_attn.q_proj"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpt_oss.load_adapter(folder, config())
    assert any("layers.0.self_attn.q_proj" in str(one.message) for one in caught) == warned


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, "lm_head, model.embed_tokens"),
        ({"target_modules": r".*_proj|lm_head"}, "lm_head"),
        (
            {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.router.weight"]},
            "model.layers.0.mlp.router.weight, model.layers.1.mlp.router.weight",
        ),
    ],
)
def test_targets_that_jmoe_has_no_lora_on_are_warned_of(entries: dict[str, object], names: str, tmp_path: Path) -> None:
    folder = changed(tmp_path / "adapter", lambda tensors: None)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    with pytest.warns(gpt_oss.AdapterWarning, match=f"has no tensors of {re.escape(names)}, though"):
        gpt_oss.load_adapter(folder, config())


def test_an_adapter_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{PREFIX}1.{DOWN}B.weight"][0, 0] = np.nan

    folder = changed(tmp_path / "adapter", change)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: LoRA on down of layer 1 is not finite"):
        gpt_oss.load_adapter(folder, config())


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (zero(ODD, f"0.{GATE_UP}B"), ["layer 0, gate_up: changes gate alone in experts 0, 1, 2, 3: "]),
        # Columns of B count (rank, expert).
        (zero((EVEN, slice(2, None, 4)), f"1.{GATE_UP}B"), ["layer 1, gate_up: changes up alone in expert 2: "]),
        (zero(ALL, f"1.{DOWN}B"), ["layer 1, down: changes nothing, though other"]),
        (zero(ALL, "q_proj.lora_A"), ["layer 0, q: changes nothing, though", "layer 1, q: changes nothing, though"]),
        (zero((ALL, slice(3, None, 4)), f"0.{DOWN}B"), ["layer 0, down: changes nothing in expert 3 of 4"]),
    ],
)  # fmt: skip
def test_an_adapter_that_changes_half_is_reported(change: Change, lines: list[str], tmp_path: Path) -> None:
    folder = changed(tmp_path / "adapter", change)
    with pytest.warns(gpt_oss.AdapterWarning) as caught:
        gpt_oss.load_adapter(folder, config())
    head, *found = str(caught[0].message).splitlines()
    assert len(caught) == 1
    assert head == f"{folder / 'adapter_model.safetensors'} changes only part of what it has LoRA on:"
    assert len(found) == len(lines)
    assert all(line.strip().startswith(want) for line, want in zip(found, lines, strict=True))


@pytest.mark.parametrize(("target", "other"), [("gate_up", "down"), ("down", "gate_up")])
def test_lora_on_one_of_the_experts_two_is_reported(target: str, other: str, tmp_path: Path) -> None:
    lora = gpt_oss.load_adapter(CASE / "adapter", config())
    alone = gpt_oss.LoraWeights(*({target: getattr(lora, field)[target]} for field in ("a", "b", "scale")))
    with pytest.warns(gpt_oss.AdapterWarning, match=f"fail on {target} without {other}, as in layers 0, 1"):
        gpt_oss.save_adapter(tmp_path, alone)
    with pytest.warns(gpt_oss.AdapterWarning) as caught:
        gpt_oss.load_adapter(tmp_path, config())
    found = [line.strip() for line in str(caught[0].message).splitlines()[1:]]
    what = f"{target}: has LoRA and {other} has none, which vLLM does not load"
    assert found == [f"layer {layer}, {what}" for layer in range(config().num_hidden_layers)]


def test_layers_that_peft_was_told_to_leave_alone_are_not_odd(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if ".layers.1.mlp" in key]:
            del tensors[key]

    folder = changed(tmp_path / "adapter", change)
    file = folder / "adapter_config.json"
    experts = [f"layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_parameters": experts}))
    lora = gpt_oss.load_adapter(folder, config())  # warnings are errors here
    assert gpt_oss.delta_report(lora).present["down"].tolist() == [True, False]
