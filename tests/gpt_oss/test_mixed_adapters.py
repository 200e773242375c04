"""Sequences with adapters of their own in one batch: each as if all had its adapter, in prefill and in steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.bench.model.case import sizes
from jmoe.gpt_oss import GptOss
from jmoe.gpt_oss.cache import empty_cache
from jmoe.gpt_oss.decode import DecodeState, decode, prefill
from jmoe.gpt_oss.random_model import random_model

IDS = [2, -1, 0, 2, 3]


@pytest.fixture(scope="module")
def model() -> GptOss:
    return random_model(sizes()["tiny"], rank=4, adapters=5, packed=False)


@functools.partial(jax.jit, static_argnames="length")
def run(model: GptOss, ids: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Logits of 5 prompts, of more tokens than 64 in all or of fewer, and of the step after them."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 512, (5, length)), jnp.int32)
    first, state = prefill(model, tokens, jnp.full(5, length), capacity=32, adapter_ids=ids)
    return first, decode(model, tokens[:, 0], state)[0]


def logits_of(model: GptOss, length: int, ids: list[int]) -> tuple[jax.Array, jax.Array]:
    return run(model, jnp.array(ids, jnp.int32), length)


@pytest.mark.parametrize("length", [4, 20])
def test_a_sequence_has_the_results_it_has_where_all_have_its_adapter(model: GptOss, length: int) -> None:
    """On the same bits: XLA computes an adapter for all rows, and selects. One that nobody has may hold NaN."""
    lora = model.lora
    assert lora is not None
    broken = {name: a.at[:, 1].set(jnp.nan) for name, a in lora.a.items()}
    got = logits_of(model.with_adapters(type(lora)(broken, lora.b, lora.scale)), length, IDS)
    for adapter in sorted(set(IDS)):
        rows = np.flatnonzero(np.array(IDS) == adapter)
        for own, mixed in zip(logits_of(model, length, [adapter] * 5), got, strict=True):
            np.testing.assert_allclose(mixed[rows], own[rows], rtol=0, atol=0)


@pytest.mark.parametrize("length", [4, 20])
def test_an_adapter_that_does_not_exist_is_nan_in_its_own_sequence_alone(model: GptOss, length: int) -> None:
    good = logits_of(model, length, IDS)
    for mixed, want in zip(logits_of(model, length, [*IDS[:-1], 5]), good, strict=True):
        assert jnp.isnan(mixed[-1]).all()
        np.testing.assert_array_equal(mixed[:-1], want[:-1])


@pytest.mark.parametrize("sequences", [16, 128])
def test_a_step_with_mixed_adapters_is_no_loop_over_them(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the layers is a loop, and no factor is sliced out of them."""
    monkeypatch.setattr("jmoe.ops.launch.local_gpu.local_gpu", lambda: (90, "some Hopper GPU"))
    config = sizes()["tiny"]
    model = random_model(config, rank=16, adapters=8, packed=True)
    cache = empty_cache(config, model.period, sequences, 128, model.dtype)
    ids = jnp.zeros(sequences, jnp.int32)
    state = DecodeState(cache, jnp.full(sequences, 64, jnp.int32), ids, model.attention_lora())
    traced = jax.jit(decode).trace(model, jnp.zeros(sequences, jnp.int32), state)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("stablehlo.while") == 1
    factors = [f"tensor<2x8x{shape}xbf16>" for shape in ("48x64", "512x48", "16x256", "64x16")]
    sliced = [line for line in program.splitlines() if "stablehlo.dynamic_slice" in line]
    assert not [line for line in sliced if any(factor in line for factor in factors)]
