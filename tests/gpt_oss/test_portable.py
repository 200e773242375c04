"""Adapters for programs that read part of PEFT's format: what is written, what is warned of."""

import json
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jmoe import gpt_oss

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
CONFIG = gpt_oss.Config.load(CASE / "model")

# transformers 5.23 asks torch modules for an attribute that it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def adapter() -> gpt_oss.LoraWeights:
    return gpt_oss.load_adapter(CASE / "adapter", CONFIG)


def part_of(
    lora: gpt_oss.LoraWeights, targets: tuple[str, ...], scales: tuple[float, float] = (1, 1)
) -> gpt_oss.LoraWeights:
    """Some targets, q at twice the rank with the same effect; scales: factors of the two layers'."""
    a, b, scale = ({target: getattr(lora, field)[target] for target in targets} for field in ("a", "b", "scale"))
    if "q" in targets:
        a["q"], b["q"] = jnp.concatenate([a["q"]] * 2, axis=-2), jnp.concatenate([b["q"] / 2] * 2, axis=-1)
    factors = jnp.array(scales, jnp.float32)[:, None]
    return gpt_oss.LoraWeights(a, b, {target: value * factors for target, value in scale.items()})


def deltas(lora: gpt_oss.LoraWeights) -> dict[str, np.ndarray]:
    return {
        target: np.einsum("la,la...nr,la...rk->la...nk", lora.scale[target], lora.b[target], a, dtype=np.float64)
        for target, a in lora.a.items()
    }


@pytest.mark.parametrize(
    ("targets", "scales"),
    [
        (("q", "v", "gate_up", "down"), (1, 3)),
        (("gate_up",), (1, 1)),
        (("down",), (0.3, 1)),
        (("q", "down"), (0, 1)),
        (("q", "v"), (1, 2)),
    ],
)
def test_a_portable_adapter_has_one_scale_and_rank_and_both_projections(
    targets: tuple[str, ...], scales: tuple[float, float], adapter: gpt_oss.LoraWeights, tmp_path: Path
) -> None:
    part = part_of(adapter, targets, scales)
    gpt_oss.save_adapter(tmp_path, part, portable=True)  # warnings are errors here
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    rank = 4 if "q" in targets else 2
    assert (settings["r"], settings["lora_alpha"]) == (rank, rank)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for layer, factor in enumerate(scales):
        inner, outer = (f"base_model.model.model.layers.{layer}.mlp.experts.{name}" for name in ("base_layer.", ""))
        on_experts = factor != 0 and not {"gate_up", "down"}.isdisjoint(targets)
        assert (f"{inner}lora_A.weight" in tensors) == (f"{outer}lora_A.weight" in tensors) == on_experts
    with warnings.catch_warnings():
        if set(targets).isdisjoint({"gate_up", "down"}) or 0 in scales:
            warnings.simplefilter("ignore", gpt_oss.AdapterWarning)
        got = deltas(gpt_oss.load_adapter(tmp_path, CONFIG))
    want = deltas(part)
    for target, change in got.items():
        np.testing.assert_allclose(change, want.get(target, np.zeros_like(change)), rtol=1e-5, atol=1e-6)
    assert set(got) == set(want) | ({"gate_up", "down"} if {"gate_up", "down"} & set(targets) else set())


@pytest.mark.parametrize(
    ("targets", "scales", "message"),
    [
        (("q", "v"), (1, 1), "vLLM 0.26 drops rank_pattern and alpha_pattern without a word"),
        (("v", "o"), (1, 2), "vLLM 0.26 drops alpha_pattern without a word"),
        (("gate_up",), (1, 1), "vLLM 0.26 and 0.33 fail on gate_up without down, as in layers 0, 1"),
        (("down",), (0, 1), "vLLM 0.26 and 0.33 fail on down without gate_up, as in layers 1;"),
    ],
)
def test_what_others_misread_is_warned_of(
    targets: tuple[str, ...], scales: tuple[float, float], message: str, adapter: gpt_oss.LoraWeights, tmp_path: Path
) -> None:
    with pytest.warns(gpt_oss.AdapterWarning, match=message) as caught:
        gpt_oss.save_adapter(tmp_path, part_of(adapter, targets, scales))
    assert caught[0].filename == __file__
    assert "portable=True" in str(caught[0].message)
