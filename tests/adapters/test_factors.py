"""Factors of any layout of files beside the changes that they were written from."""

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.adapters import load_lora
from jmoe.adapters.sizes import sizes_of_adapter
from jmoe.checkpoint.config_file import Config
from jmoe.ops.experts import Lora
from tests import adapter_layouts as layouts
from tests.adapter_layouts import Tensors

E, H, I = 3, 10, 6  # noqa: E741
SIZES = {"gate_up": (2 * I, H), "down": (H, I)}
CONFIG = Config(2, H, I, num_local_experts=E, num_experts_per_tok=2, vocab_size=16, rms_norm_eps=1e-5)
BASE = {"peft_type": "LORA", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}

type ByTarget = dict[str, tuple[np.ndarray, np.ndarray]]


def random_factors(rng: np.random.Generator, rank: int) -> ByTarget:
    """A [E, r, K] and B [E, N, r]."""
    return {
        target: (rng.standard_normal((E, rank, k)), rng.standard_normal((E, n, rank)))
        for target, (n, k) in SIZES.items()
    }


def delta(lora: Lora, target: str) -> np.ndarray:
    """What a Lora adds to the weights, float64 [E, N, K]."""
    a, b, scale = (np.asarray(getattr(lora, f"{target}_{part}"), np.float64)[0] for part in ("a", "b", "scale"))
    return scale * (b @ a)


def written(folder: Path, factors: list[ByTarget], form: str, order: str, dtype: Any, **entries: Any) -> Path:
    """The two layers' factors in one form, with exact settings of rank and scale 1.5."""
    rank = factors[0]["down"][0].shape[1]
    tensors: Tensors = {}
    for layer, of_layer in enumerate(factors):
        if form == "parameters":
            tensors |= layouts.as_parameters(layer, of_layer, order)
        elif form == "stacked":
            tensors |= layouts.as_stacked(layer, of_layer)
        elif form == "halves":
            tensors |= layouts.as_halves(layer, of_layer)
        else:
            tensors |= layouts.as_pairs(layer, of_layer, form)
    cast = {key: value.astype(dtype) for key, value in tensors.items()}
    return layouts.write(folder, cast, BASE | {"r": rank, "lora_alpha": 1.5 * rank} | entries)


FORMS = ["parameters", "stacked", "halves", "{expert}.{target}_proj", "{target}_projs.{expert}"]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    order=st.sampled_from(["rank_major", "grouped_by_expert"]),
    rank=st.integers(1, 4),
    swapped=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    seed=st.integers(0, 99),
)
def test_every_form_gives_the_changes_it_was_written_from(
    form: str, order: str, rank: int, swapped: bool, dtype: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    factors = [random_factors(rng, rank) for _ in range(2)]
    # Small integers, exact in every dtype.
    factors = [{t: (np.round(2 * a), np.round(2 * b)) for t, (a, b) in of.items()} for of in factors]
    want = [{target: 1.5 * (b @ a) for target, (a, b) in of.items()} for of in factors]
    if swapped and form != "halves":
        factors = [{t: (b.swapaxes(1, 2), a.swapaxes(1, 2)) for t, (a, b) in of.items()} for of in factors]
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), factors, form, order, dtype, lora_B_layout=order)
        for layer, of_layer in enumerate(want):
            lora = load_lora(path, CONFIG, layer)
            assert lora.down_a is not None
            assert lora.down_a.dtype == (ml_dtypes.bfloat16 if dtype == ml_dtypes.bfloat16 else np.float32)
            for target, change in of_layer.items():
                np.testing.assert_allclose(delta(lora, target), change, rtol=1e-6)
        sizes = sizes_of_adapter(path)
        assert (sizes.layers, sizes.experts, dict(sizes.weights)) == (2, E, SIZES)


@pytest.mark.parametrize("form", ["{expert}.{target}_proj", "{target}_projs.{expert}"])
def test_experts_have_ranks_and_scales_of_their_own(form: str, tmp_path: Path) -> None:
    """By the names of their modules; what no pattern of theirs names has that of all experts' weight."""
    rng = np.random.default_rng(0)
    factors = random_factors(rng, 4)
    special = form.format(expert=1, target="down")
    ranks = [4, 2, 4]
    tensors = layouts.as_pairs(0, factors, form)
    for part in "AB":
        key = f"{layouts.PREFIX}0.mlp.experts.{special}.lora_{part}.weight"
        tensors[key] = tensors[key][:2] if part == "A" else tensors[key][:, :2]
    entries = BASE | {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {special.replace(".", r"\."): 2},
        "alpha_pattern": {special.replace(".", r"\."): 10, "mlp.experts.down_proj": 2},
    }
    layouts.write(tmp_path, {key: value.astype(np.float32) for key, value in tensors.items()}, entries)
    lora = load_lora(tmp_path, CONFIG, 0)
    scales = [0.5, 5.0, 0.5]
    a, b = factors["down"]
    for e in range(E):
        want = scales[e] * (b[e, :, : ranks[e]] @ a[e, : ranks[e]])
        np.testing.assert_allclose(delta(lora, "down")[e], want, rtol=1e-5, atol=1e-6)
    assert lora.gate_up_scale is not None
    assert lora.gate_up_scale.tolist() == [2.0]


def test_gate_and_up_of_different_factors_add_their_ranks(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    gate, up = ((rng.standard_normal((E, r, H)), rng.standard_normal((E, I, r))) for r in (2, 3))
    tensors = layouts.as_pairs(0, {"w1": gate, "w3": up}, "{expert}.{target}")
    entries = BASE | {"r": 2, "lora_alpha": 2, "rank_pattern": {"w3": 3}, "alpha_pattern": {"w3": 12}}
    layouts.write(tmp_path, {key: value.astype(np.float32) for key, value in tensors.items()}, entries)
    lora = load_lora(tmp_path, CONFIG, 0)
    assert lora.gate_up_a is not None
    assert lora.gate_up_a.shape == (1, E, 5, H)
    change = delta(lora, "gate_up")
    np.testing.assert_allclose(change[:, 0::2], gate[1] @ gate[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(change[:, 1::2], 4 * (up[1] @ up[0]), rtol=1e-5, atol=1e-6)
    assert lora.down_a is None


def test_halves_of_one_adapter_keep_its_rank(tmp_path: Path) -> None:
    factors = [random_factors(np.random.default_rng(2), 3)]
    lora = load_lora(written(tmp_path, factors, "halves", "", np.float32), CONFIG, 0)
    np.testing.assert_array_equal(np.asarray(lora.gate_up_a)[0], factors[0]["gate_up"][0].astype(np.float32))
    np.testing.assert_array_equal(np.asarray(lora.gate_up_b)[0], factors[0]["gate_up"][1].astype(np.float32))


def test_parameters_may_be_stacked_under_pefts_own_keys(tmp_path: Path) -> None:
    factors = random_factors(np.random.default_rng(3), 2)
    tensors = {}
    for target, module in (("gate_up", "experts.base_layer"), ("down", "experts")):
        for part, factor in zip("AB", factors[target], strict=True):
            tensors[f"{layouts.PREFIX}0.mlp.{module}.lora_{part}.weight"] = factor.astype(np.float32)
    layouts.write(tmp_path, tensors, BASE | {"r": 2, "lora_alpha": 2})
    lora = load_lora(tmp_path, CONFIG, 0)
    for target, (a, b) in factors.items():
        np.testing.assert_allclose(delta(lora, target), b @ a, rtol=1e-4, atol=1e-5)
