"""Decoding against the cache, beside the whole sequence at once and transformers' greedy text."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe import gpt_oss
from jmoe.bench.model.case import sizes
from jmoe.gpt_oss.cache import empty_cache, slot_positions
from jmoe.gpt_oss.decode import DecodeState, decode, prefill
from jmoe.gpt_oss.random_model import random_model

CASE = Path(__file__).parents[1] / "data" / "tiny_case"


@pytest.fixture(scope="module")
def model() -> gpt_oss.GptOss:
    return gpt_oss.load(CASE / "model", adapter=CASE / "adapter", dtype=jnp.float32, progress=False)


@pytest.mark.slow
def test_steps_are_the_whole_sequence_for_prompts_of_different_lengths(model: gpt_oss.GptOss) -> None:
    """Across the window of 8, prompts shorter and longer than it, one with the adapter and one without."""
    tokens = np.random.default_rng(0).integers(0, 128, (3, 30)).astype(np.int32)
    lengths, ids = np.array([3, 8, 17], np.int32), jnp.array([0, -1, 0], jnp.int32)
    whole = np.asarray(nnx.jit(lambda model: model(tokens, adapter_ids=ids))(model))
    start = nnx.jit(lambda model: prefill(model, tokens[:, :17], lengths, capacity=40, adapter_ids=ids))
    step = nnx.jit(decode)
    logits, state = start(model)
    for i in range(13):
        for b, length in enumerate(lengths):
            np.testing.assert_allclose(logits[b], whole[b, length - 1 + i], rtol=2e-4, atol=2e-4)
        following = tokens[np.arange(3), lengths + i]
        logits, state = step(model, jnp.asarray(following), state)
    assert state.lengths.tolist() == (lengths + 13).tolist()
    assert [entries.shape[3] for entries in state.cache] == [8, 40]


@pytest.mark.parametrize(("adapter", "name"), [(-1, "gen_tokens"), (0, "gen_tokens_adapter")])
def test_greedy_text_is_that_of_transformers(model: gpt_oss.GptOss, adapter: int, name: str) -> None:
    with np.load(CASE / "expected.npz") as arrays:
        prompt, want = arrays["gen_prompt"], arrays[name]
    ids = jnp.full(1, adapter, jnp.int32)
    logits, state = prefill(model, jnp.asarray(prompt), jnp.array([6], jnp.int32), capacity=24, adapter_ids=ids)
    step, got = nnx.jit(decode), []
    for _ in want:
        got.append(int(logits[0].argmax()))
        logits, state = step(model, jnp.array(got[-1:], jnp.int32), state)
    assert got == want.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "ids"), [(None, None), (CASE / "adapter", None), (CASE / "adapter", [0, -1, 0])])
def test_bfloat16_steps_round_no_more_than_the_whole_sequence(adapter: Path | None, ids: list[int] | None) -> None:
    """Few tokens in bfloat16 take launches of their own, whose sums are rounded where the other layers' are."""
    tokens, length = np.random.default_rng(0).integers(0, 128, (3, 24)).astype(np.int32), 6
    adapter_ids = None if ids is None else jnp.array(ids, jnp.int32)

    def in_steps(model: gpt_oss.GptOss) -> np.ndarray:
        lengths = jnp.full(3, length, jnp.int32)
        start = jax.jit(lambda model: prefill(model, tokens[:, :length], lengths, capacity=40, adapter_ids=adapter_ids))
        logits, state = start(model)
        found, step = [logits], jax.jit(decode)
        for i in range(length, tokens.shape[1]):
            logits, state = step(model, tokens[:, i], state)
            found.append(logits)
        return np.stack(found, axis=1)

    narrow, wide = (
        gpt_oss.load(CASE / "model", adapter=adapter, dtype=dtype, progress=False)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    whole = jax.jit(lambda model: model(tokens, adapter_ids=adapter_ids)[:, length - 1 :])
    want = np.asarray(whole(wide))

    def median_error(got: np.ndarray) -> float:
        """By tokens: one whose router's logits nearly tie may take another expert in bfloat16."""
        return float(np.median(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)))

    assert median_error(in_steps(narrow)) <= 1.1 * median_error(np.asarray(whole(narrow)))


def test_a_step_on_a_gpu_is_few_launches_that_read_every_weight_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jmoe.ops.launch.local_gpu.local_gpu", lambda: (90, "some Hopper GPU"))
    config = sizes()["tiny"]
    model = random_model(config, rank=16, packed=True)
    cache = empty_cache(config, model.period, 2, 1088, model.dtype)
    state = DecodeState(cache, jnp.full(2, 1024, jnp.int32), None, model.attention_lora())
    tokens = jnp.zeros(2, jnp.int32)
    program = jax.jit(decode).trace(model, tokens, state).lower(lowering_platforms=("cuda",)).as_text()
    # Norm, product and attention with q, k and v; LoRA on o, product; norm with the router; three of experts. On the
    # full layer attention is split. The last norm.
    assert program.count("@triton_kernel_call_ffi") == 9 + 10 + 1
    # In place: each layer's cache, and the counters of its experts' launch.
    assert program.count("output_operand_alias<") == 2 + 2
    sliced = re.findall(r"stablehlo\.dynamic_(?:update_)?slice .*: \(tensor<([^>]*)>", program)
    assert sliced
    assert all(operand.endswith("xi32") for operand in sliced)


def test_slots_hold_the_latest_tokens() -> None:
    assert slot_positions(jnp.array([2, 5]), 4).tolist() == [[0, 1, 2, -1], [4, 5, 2, 3]]


def test_prompts_that_do_not_fit_are_an_error(model: gpt_oss.GptOss) -> None:
    with pytest.raises(ValueError, match="prompts of 9 tokens do not fit a capacity of 8"):
        prefill(model, jnp.zeros((1, 9), jnp.int32), jnp.array([9]), capacity=8)
    for length in (0, 10, -3):
        with pytest.raises(ValueError, match=rf"lengths must be in \[1, 10\), got {length}"):
            prefill(model, jnp.zeros((1, 9), jnp.int32), jnp.array([length]), capacity=16)
