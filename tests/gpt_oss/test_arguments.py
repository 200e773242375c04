"""Arguments of the model that do not fit it: errors when concrete, NaN when traced."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe import gpt_oss
from jmoe.gpt_oss.weights import ATTENTION

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]], jnp.int32)
IDS = jnp.array([0, -1], jnp.int32)


@pytest.fixture(scope="module")
def model() -> gpt_oss.GptOss:
    """With an adapter on attention alone, whose ids jmoe.moe never sees."""
    base = gpt_oss.load(CASE / "model", dtype=jnp.float32, progress=False)
    lora = gpt_oss.load_adapter(CASE / "adapter", base.config)
    a, b, scale = ({name: part[name] for name in ATTENTION} for part in (lora.a, lora.b, lora.scale))
    return gpt_oss.GptOss(
        base.config,
        embedding=base.embedding.get_value(),
        layers=base.stack,
        norm=base.norm.get_value(),
        head=base.head.get_value(),
        lora=gpt_oss.LoraWeights(a, b, scale),
        dtype=jnp.float32,
    )


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TOKENS, {"adapter_ids": IDS + 1}, r"adapter_ids must be in \[-1, 1\), got 1"),
        (TOKENS, {"adapter_ids": IDS - 1}, r"adapter_ids must be in \[-1, 1\), got -2"),
        (TOKENS, {"adapter_ids": jnp.zeros(2)}, "adapter_ids must be integers .* got float32"),
        (TOKENS.at[1, 1].set(-1), {}, r"tokens must be in \[0, 128\), got -1"),
        (TOKENS.at[1, 1].set(128), {}, r"tokens must be in \[0, 128\), got 128"),
        (TOKENS, {"positions": jnp.arange(3)}, r"positions must be integers like tokens \(2, 3\), got int32 .*\(3,\)"),
        (TOKENS, {"positions": jnp.zeros((2, 3))}, "positions must be integers .* got float32"),
        (TOKENS, {"segment_ids": jnp.zeros((2, 4), int)}, r"segment_ids must be integers .* \(2, 4\)"),
        (TOKENS, {"segment_ids": jnp.zeros((2, 3), bool)}, "segment_ids must be integers .* got bool"),
        (TOKENS[:, :0], {"last_only": True}, r"at least one token in each sequence, got tokens \(2, 0\)"),
    ],
)
def test_what_does_not_fit_is_an_error(model: gpt_oss.GptOss, tokens: jnp.ndarray, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(tokens, **options)


def test_generate_knows_its_adapters(model: gpt_oss.GptOss) -> None:
    with pytest.raises(ValueError, match=r"adapter_ids must be in \[-1, 1\), got 1"):
        gpt_oss.generate(model, [[1]], max_new_tokens=1, adapter_ids=[1])


def test_what_is_traced_gives_nan_in_its_sequence_alone(model: gpt_oss.GptOss) -> None:
    call = nnx.jit(lambda model, tokens, ids: model(tokens, adapter_ids=ids))
    right = np.asarray(call(model, TOKENS, IDS))
    assert np.isfinite(right).all()
    for tokens, ids in (
        (TOKENS, IDS.at[0].set(1)),
        (TOKENS, IDS.at[0].set(-2)),
        (TOKENS.at[0, 0].set(-1), IDS),
        (TOKENS.at[0, 0].set(128), IDS),
    ):
        got = np.asarray(call(model, tokens, ids))
        assert np.isnan(got[0]).all()
        np.testing.assert_array_equal(got[1], right[1])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_tokens_have_no_logits(model: gpt_oss.GptOss, shape: tuple[int, int]) -> None:
    logits = model(jnp.zeros(shape, jnp.int32))
    assert (logits.shape, logits.dtype) == ((*shape, 128), jnp.float32)
