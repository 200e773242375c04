"""The whole model beside transformers, on the same checkpoint."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GptOssForCausalLM, Mxfp4Config

from jmoe import gpt_oss
from jmoe.gpt_oss.layer import Remat

CASE = Path(__file__).parents[1] / "data" / "tiny_case"

# transformers 5.23 asks torch modules for an attribute that it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def theirs() -> GptOssForCausalLM:
    return in_transformers(torch.float32)


def in_transformers(dtype: torch.dtype) -> GptOssForCausalLM:
    """The checkpoint in transformers, dequantised, with sinks that are felt and attention as written."""
    model = GptOssForCausalLM.from_pretrained(
        CASE / "model", dtype=dtype, quantization_config=Mxfp4Config(dequantize=True), device_map="cpu",
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    for i, block in enumerate(model.model.layers):
        block.self_attn.sinks.data = torch.linspace(-3, 5, block.self_attn.sinks.shape[0]).roll(i).bfloat16().to(dtype)
    return model


def ours(dtype: object) -> gpt_oss.GptOss:
    model = gpt_oss.load(CASE / "model", dtype=dtype, progress=False)
    count, heads = model.stack.sinks.shape
    sinks = jnp.stack([jnp.roll(jnp.linspace(-3, 5, heads), i) for i in range(count)]).astype(jnp.bfloat16)
    model.layers.sinks.set_value(sinks)
    return model


def random_tokens(model: gpt_oss.GptOss, length: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, length)).astype(np.int32)


def test_float32_logits_are_those_of_transformers_beyond_the_window(theirs: GptOssForCausalLM) -> None:
    model = ours(jnp.float32)
    tokens = random_tokens(model, 3 * model.config.sliding_window + 5)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    got = jax.jit(lambda tokens: model(tokens))(tokens)
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)


def test_bfloat16_logits_are_no_further_off_than_torchs(theirs: GptOssForCausalLM) -> None:
    model = ours(jnp.bfloat16)
    tokens = random_tokens(model, 2 * model.config.sliding_window)
    with torch.no_grad():
        exact = theirs(torch.from_numpy(tokens).long()).logits.numpy()
        in_bfloat16 = in_transformers(torch.bfloat16)(torch.from_numpy(tokens).long()).logits.float().numpy()
    got = np.asarray(jax.jit(lambda tokens: model(tokens))(tokens))
    assert got.dtype == np.float32

    def errors(logits: np.ndarray) -> np.ndarray:
        return np.linalg.norm(logits - exact, axis=-1) / np.linalg.norm(exact, axis=-1)

    # By tokens: one whose router's logits nearly tie may take another expert in bfloat16, and is then far off.
    assert np.median(errors(got)) <= 1.1 * np.median(errors(in_bfloat16))
    assert (errors(got) > 0.05).mean() <= 0.1


def test_greedy_text_is_that_of_transformers(theirs: GptOssForCausalLM) -> None:
    model = ours(jnp.float32)
    prompt = random_tokens(model, 7, batch=1)
    length, new = 32, 20
    tokens = np.zeros((1, length), np.int32)
    tokens[:, :7] = prompt
    logits = jax.jit(lambda tokens: model(tokens))
    for i in range(7, 7 + new):
        tokens[0, i] = int(jnp.argmax(logits(tokens)[0, i - 1]))
    want = theirs.generate(
        torch.from_numpy(prompt).long(), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )
    assert tokens[0, : 7 + new].tolist() == want[0].tolist()


def test_the_last_tokens_logits_alone() -> None:
    model = ours(jnp.float32)
    tokens = random_tokens(model, 9)
    np.testing.assert_allclose(model(tokens, last_only=True), model(tokens)[:, -1:], rtol=1e-5, atol=1e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    model = ours(jnp.float32)
    tokens = random_tokens(model, 60, batch=1)
    segments = jnp.array([[0] * 25 + [1] * 35])
    together = model(tokens, segment_ids=segments)
    alone = [model(tokens[:, :25]), model(tokens[:, 25:])]
    np.testing.assert_allclose(together, jnp.concatenate(alone, axis=1), rtol=1e-4, atol=1e-4)


def test_packed_decode_are_the_same_model() -> None:
    tokens = random_tokens(ours(jnp.float32), 9)
    packed = gpt_oss.load(CASE / "model", packed=True, progress=False)
    plain = gpt_oss.load(CASE / "model", packed=False, progress=False)
    np.testing.assert_array_equal(packed(tokens), plain(tokens))


@pytest.mark.slow
def test_remat_changes_no_gradient() -> None:
    tokens = random_tokens(ours(jnp.float32), 12)
    model = ours(jnp.float32)
    layers, rest = model.stack, {name: getattr(model, name)[...] for name in ("embedding", "norm", "head")}

    def loss(norm: jax.Array, remat: Remat) -> jax.Array:
        changed = gpt_oss.LayerWeights(**{**vars(layers), "moe_norm": norm})
        return jnp.sum(
            gpt_oss.GptOss(model.config, layers=changed, dtype=jnp.float32, remat=remat, **rest)(tokens) ** 2
        )

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    norm = layers.moe_norm.astype(jnp.float32)
    np.testing.assert_allclose(gradient(norm, "layers"), gradient(norm, "nothing"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (np.zeros((1, 3), np.float32), {}, r"tokens must be integers \[B, T\], got float32"),
        (np.zeros(3, np.int32), {}, r"tokens must be integers \[B, T\], got int32 with shape \(3,\)"),
        (np.zeros((1, 3), np.int32), {"adapter_ids": np.zeros(1, np.int32)}, "a model without adapters"),
    ],
)
def test_calls_that_do_not_fit(tokens: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(jnp.float32)(tokens, **options)


def test_an_unknown_remat_is_an_error() -> None:
    with pytest.raises(ValueError, match='remat must be "nothing", "experts" or "layers", got True'):
        gpt_oss.load(CASE / "model", progress=False, remat=True)  # type: ignore[arg-type]
