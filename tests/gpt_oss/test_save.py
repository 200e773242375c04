"""What is saved is what jmoe and PEFT load."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import GptOssForCausalLM, Mxfp4Config

from jmoe import gpt_oss
from jmoe.gpt_oss.save import alpha_of

CASE = Path(__file__).parents[1] / "data" / "tiny_case"

# transformers 5.23 asks torch modules for an attribute that it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapter() -> gpt_oss.LoraWeights:
    return gpt_oss.load_adapter(CASE / "adapter", gpt_oss.Config.load(CASE / "model"))


def assert_same(one: gpt_oss.LoraWeights, other: gpt_oss.LoraWeights) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_round_trip(adapter: gpt_oss.LoraWeights, tmp_path: Path) -> None:
    gpt_oss.save_adapter(tmp_path / "saved", adapter)
    assert_same(gpt_oss.load_adapter(tmp_path / "saved", gpt_oss.Config.load(CASE / "model")), adapter)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_files_are_for_whom_any_new_file_is(adapter: gpt_oss.LoraWeights, tmp_path: Path) -> None:
    gpt_oss.save_adapter(tmp_path, adapter)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_a_full_disk_leaves_the_adapter_before(
    adapter: gpt_oss.LoraWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    gpt_oss.save_adapter(tmp_path, adapter)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr("jmoe.files.save_file", full)
    with pytest.raises(OSError, match=r"adapter_model.safetensors could not be written: .*No space left"):
        gpt_oss.save_adapter(tmp_path, jax.tree.map(lambda leaf: 2 * leaf, adapter))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.filterwarnings("ignore::jmoe.gpt_oss.AdapterWarning")
@pytest.mark.parametrize("targets", [["q", "down"], ["gate_up"], ["down"], ["v"]])
def test_some_targets_of_several_ranks_and_scales(
    targets: list[str], adapter: gpt_oss.LoraWeights, tmp_path: Path
) -> None:
    double = gpt_oss.stack_adapters([adapter])
    a = {target: double.a[target] for target in targets}
    b = {target: double.b[target] for target in targets}
    scale = {target: double.scale[target].at[1].mul(1.5) for target in targets}
    a[targets[0]] = jnp.concatenate([a[targets[0]]] * 2, axis=-2)
    b[targets[0]] = jnp.concatenate([b[targets[0]]] * 2, axis=-1)
    part = gpt_oss.LoraWeights(a, b, scale)
    gpt_oss.save_adapter(tmp_path, part)
    assert_same(gpt_oss.load_adapter(tmp_path, gpt_oss.Config.load(CASE / "model")), part)


@pytest.mark.filterwarnings("ignore::jmoe.gpt_oss.AdapterWarning")
def test_layers_of_scale_zero_are_left_out(adapter: gpt_oss.LoraWeights, tmp_path: Path) -> None:
    first = jnp.array([1.0, 0.0])[:, None]
    scale = {target: value * (first if target in ("q", "gate_up") else 1) for target, value in adapter.scale.items()}

    def of_scale(factors: dict[str, jax.Array]) -> dict[str, jax.Array]:
        shown = {
            target: (value != 0).astype(jnp.float32).reshape(2, 1, *[1] * (factors[target].ndim - 2))
            for target, value in scale.items()
        }
        return {target: factors[target] * shown[target] for target in factors}

    part = gpt_oss.LoraWeights(of_scale(adapter.a), of_scale(adapter.b), scale)
    gpt_oss.save_adapter(tmp_path, part)
    assert_same(gpt_oss.load_adapter(tmp_path, gpt_oss.Config.load(CASE / "model")), part)
    base = GptOssForCausalLM.from_pretrained(
        CASE / "model", dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), device_map="cpu"
    )
    lora = [name for name, _ in PeftModel.from_pretrained(base, tmp_path).named_parameters() if "lora_A" in name]
    assert len(lora) == len(adapter.a) * 2 - 2


@pytest.mark.parametrize(("alpha", "rank"), [(16, 8), (8, 32), (10, 24), (1e-7, 8), (64, 3)])
def test_alphas_are_short_and_give_the_scale(alpha: float, rank: int) -> None:
    assert alpha_of(float(np.float32(alpha / rank)), rank) == alpha
    root = float(np.float32(alpha / math.sqrt(rank)))
    assert np.float32(alpha_of(root, rank) / rank) == np.float32(root)


def test_small_alphas_are_kept(adapter: gpt_oss.LoraWeights, tmp_path: Path) -> None:
    small = gpt_oss.LoraWeights(adapter.a, adapter.b, {name: 1e-9 * scale for name, scale in adapter.scale.items()})
    gpt_oss.save_adapter(tmp_path, small)
    assert_same(gpt_oss.load_adapter(tmp_path, gpt_oss.Config.load(CASE / "model")), small)


def test_an_adapter_that_changes_nothing_is_not_written(adapter: gpt_oss.LoraWeights, tmp_path: Path) -> None:
    nothing = gpt_oss.LoraWeights(adapter.a, adapter.b, {name: 0 * scale for name, scale in adapter.scale.items()})
    with pytest.raises(ValueError, match="adapter 0 must change some layer, got scales of 0 alone"):
        gpt_oss.save_adapter(tmp_path, nothing)


@pytest.mark.parametrize("portable", [False, True])
def test_peft_loads_it_and_computes_the_same(portable: bool, adapter: gpt_oss.LoraWeights, tmp_path: Path) -> None:
    others = jax.tree.map(lambda leaf: 0.5 * leaf, adapter)
    gpt_oss.save_adapter(tmp_path, gpt_oss.stack_adapters([others, adapter]), adapter=1, portable=portable)
    base = GptOssForCausalLM.from_pretrained(
        CASE / "model", dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), device_map="cpu",
        attn_implementation="eager",
    )  # fmt: skip
    theirs = PeftModel.from_pretrained(base, tmp_path)
    with np.load(CASE / "expected.npz") as arrays, torch.no_grad():
        got = theirs(torch.from_numpy(arrays["input_ids"]).long()).logits.numpy()
        want = arrays["adapter_logits"]
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)


def test_an_adapter_that_is_not_there(adapter: gpt_oss.LoraWeights, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter must be in \[0, 1\), got 1"):
        gpt_oss.save_adapter(tmp_path, adapter, adapter=1)


def test_dropout_is_written_where_peft_loads_it(adapter: gpt_oss.LoraWeights, tmp_path: Path) -> None:
    """PEFT refuses an adapter with dropout on 3-D expert parameters."""

    def written(path: Path) -> float:
        return json.loads((path / "adapter_config.json").read_text())["lora_dropout"]

    gpt_oss.save_adapter(tmp_path / "all", adapter, dropout=0.1)
    attention = gpt_oss.LoraWeights(
        *({t: factors[t] for t in ("q", "o")} for factors in (adapter.a, adapter.b, adapter.scale))
    )
    gpt_oss.save_adapter(tmp_path / "attention", attention, dropout=0.1)
    assert (written(tmp_path / "all"), written(tmp_path / "attention")) == (0.0, 0.1)
    assert_same(gpt_oss.load_adapter(tmp_path / "attention", gpt_oss.Config.load(CASE / "model")), attention)
