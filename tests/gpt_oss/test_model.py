"""The whole model beside transformers, on the same checkpoint."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GptOssForCausalLM, Mxfp4Config

from jmoe import gpt_oss

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
    layers = model.layers.get_value()
    count, heads = layers.sinks.shape
    sinks = jnp.stack([jnp.roll(jnp.linspace(-3, 5, heads), i) for i in range(count)]).astype(jnp.bfloat16)
    model.layers.set_value(gpt_oss.LayerWeights(**{**vars(layers), "sinks": sinks}))
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
