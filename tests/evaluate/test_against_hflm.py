"""The harness's own model (HFLM, of transformers) on the same checkpoint, and what it answers to the same requests."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GptOssForCausalLM, Mxfp4Config

from jmoe import gpt_oss
from jmoe.evaluate.harness import HarnessModel
from jmoe.text import load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
LENGTH = 16

# transformers 5.23 asks torch modules for an attribute that it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model() -> gpt_oss.GptOss:
    return gpt_oss.load(TINY, dtype=jnp.float32, progress=False)


@pytest.fixture(scope="module")
def transformers_model() -> GptOssForCausalLM:
    return GptOssForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), device_map="cpu",
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip


@pytest.fixture(params=["<|start|>", None], ids=["BOS", "no BOS"])
def both(
    request: pytest.FixtureRequest, model: gpt_oss.GptOss, transformers_model: GptOssForCausalLM
) -> tuple[HarnessModel, HFLM]:
    """(ours, theirs) with a tokenizer that has a BOS, or has none."""
    tokenizer = load_tokenizer(TINY)
    tokenizer.bos_token = request.param
    theirs = HFLM(pretrained=transformers_model, tokenizer=tokenizer, batch_size=1, max_length=LENGTH)
    return HarnessModel(model, tokenizer, batch_size=4, max_length=LENGTH), theirs


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, own, i) for i, own in enumerate(arguments)]


@pytest.mark.slow
def test_log_likelihoods_and_perplexities(both: tuple[HarnessModel, HFLM]) -> None:
    ours, theirs = both
    assert ours.prefix_token_id == theirs.prefix_token_id
    pairs = requests(
        "loglikelihood",
        [
            ("", "You may obtain"),
            ("", "<|start|>user"),
            ("You may ", "not"),
            ("<|start|>user<|message|>Hi<|end|>", " Yes"),
            ("The License. " * 9 + "See", " the License"),
        ],
    )
    for found, want in zip(ours.loglikelihood(pairs, True), theirs.loglikelihood(pairs, True), strict=True):
        assert found == (pytest.approx(want[0], rel=1e-3), want[1])
    texts = requests("loglikelihood_rolling", [("You may obtain a copy of the License. ",), ("<|endoftext|>You",)])
    assert ours.loglikelihood_rolling(texts, True) == pytest.approx(theirs.loglikelihood_rolling(texts, True), rel=1e-3)


@pytest.mark.slow
def test_generated_answers(both: tuple[HarnessModel, HFLM]) -> None:
    ours, theirs = both
    greedy: dict[str, Any] = {"max_gen_toks": 8, "do_sample": False}
    (first, *_) = theirs.generate_until(requests("generate_until", [("You may", greedy | {"until": []})]), True)
    asked = requests(
        "generate_until",
        [
            ("You may", greedy | {"until": [first[2:4]]}),
            ("The Apache License, Version 2.0, is one of many that one may read", greedy | {"until": "\n\n"}),
            ("<|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>", greedy | {"until": []}),
        ],
    )
    assert ours.generate_until(asked, True) == theirs.generate_until(asked, True)
