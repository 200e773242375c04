"""Requests of the lm-evaluation-harness, answered as transformers and the model itself answer them."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import GptOssForCausalLM, Mxfp4Config

from jmoe import gpt_oss
from jmoe.evaluate.harness import HarnessModel
from jmoe.evaluate.score import Span, power_of_two, score, static_width
from jmoe.text import encode, load_tokenizer
from tests.evaluate.tasks import TEXTS, write_tasks

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
END_OF_TEXT = 0

PAIRS = [
    ("Licensed under the Apache", " License"),
    ("", "You may obtain a copy"),
    ("You may ", "not"),
    ("You may ", "reproduce"),
    ("The License. " * 3 + "See", " the License for the specific language"),
]

# transformers 5.23 asks torch modules for an attribute that it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model() -> gpt_oss.GptOss:
    return gpt_oss.load(TINY, adapter=TINY / "adapter", dtype=jnp.float32, progress=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def base(model: gpt_oss.GptOss, tokenizer: Any) -> HarnessModel:
    return HarnessModel(model, tokenizer, adapter=-1, batch_size=4)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {"number": i}, own, i) for i, own in enumerate(arguments)]


def loglikelihood(model: HarnessModel, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


def direct(model: gpt_oss.GptOss, tokens: list[int], adapter: int = -1) -> np.ndarray:
    """Log-probabilities [T, V] of what follows each token, by the model's own call."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(jax.nn.log_softmax(whole(model, padded, np.array([adapter], np.int32)), axis=-1))[
        0, : len(tokens)
    ]


@nnx.jit
def whole(model: gpt_oss.GptOss, tokens: jax.Array, adapters: jax.Array) -> jax.Array:
    return model(tokens, adapter_ids=adapters)


def tokens_of(tokenizer: Any, pair: tuple[str, str]) -> tuple[list[int], int]:
    """(all tokens with an end of text before a text without context, how many are the continuation's)."""
    context, continuation = pair
    together = encode(tokenizer, context + continuation)
    return (together, len(together) - len(encode(tokenizer, context.rstrip()))) if context else (
        [END_OF_TEXT, *together], len(together),
    )  # fmt: skip


def by(log_probabilities: np.ndarray, tokens: list[int], count: int) -> tuple[float, bool]:
    """The sum over the last `count` tokens, and whether each is the likeliest; log_probabilities of all tokens."""
    before = log_probabilities[len(tokens) - 1 - count : len(tokens) - 1]
    targets = np.array(tokens[-count:])
    return before[np.arange(count), targets].sum(), bool((before.argmax(axis=-1) == targets).all())


def test_loglikelihoods_are_those_of_transformers(base: HarnessModel, tokenizer: Any) -> None:
    theirs = GptOssForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), device_map="cpu",
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    for pair, (value, greedy) in zip(PAIRS, loglikelihood(base, PAIRS), strict=True):
        tokens, count = tokens_of(tokenizer, pair)
        with torch.no_grad():
            logits = theirs(torch.tensor([tokens])).logits.log_softmax(dim=-1)[0].numpy()
        want, likeliest = by(logits, tokens, count)
        assert value == pytest.approx(want, rel=1e-3)
        assert greedy == likeliest


def test_a_mixed_batch_gives_what_single_requests_give(model: gpt_oss.GptOss, tokenizer: Any) -> None:
    each = HarnessModel(model, tokenizer, adapter=lambda request: request.doc["number"] % 2 - 1, batch_size=4)
    for i, (pair, (value, greedy)) in enumerate(zip(PAIRS, loglikelihood(each, PAIRS), strict=True)):
        tokens, count = tokens_of(tokenizer, pair)
        want, likeliest = by(direct(model, tokens, adapter=i % 2 - 1), tokens, count)
        assert value == pytest.approx(want, rel=1e-4)
        assert greedy == likeliest


def test_a_greedy_continuation_is_recognised(base: HarnessModel, model: gpt_oss.GptOss, tokenizer: Any) -> None:
    context = encode(tokenizer, "You may obtain")
    likeliest = int(direct(model, context)[-1].argmax())
    pairs = [(("", ""), context, [likeliest]), (("", ""), context, [likeliest ^ 1])]
    assert [greedy for _, greedy in base._loglikelihood_tokens(pairs, disable_tqdm=True)] == [True, False]


def test_questions_with_answers_of_one_token_are_one_row(model: gpt_oss.GptOss) -> None:
    same = [Span([7, 8, 9], [target]) for target in range(6)]
    found = score(model, same, [-1] * 6, rows=1)
    np.testing.assert_allclose([each.log_probability for each in found], direct(model, [7, 8, 9])[-1, :6], rtol=1e-4)


def test_scores_are_of_tokens_that_the_model_has_and_finite(model: gpt_oss.GptOss) -> None:
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 512\), got 512: the model lacks"):
        score(model, [Span([7, 512], [8])], [-1], rows=1)
    assert model.lora is not None
    huge = model.with_adapters(jax.tree.map(lambda leaf: leaf * 1e30, model.lora))
    with pytest.raises(ValueError, match="log-probabilities must be finite"):
        score(huge, [Span([7, 8], [9])], [0], rows=1)


def test_contexts_are_cut_from_the_left(model: gpt_oss.GptOss, tokenizer: Any) -> None:
    short = HarnessModel(model, tokenizer, adapter=-1, max_length=24)
    tokens, count = tokens_of(tokenizer, PAIRS[4])
    (found,) = loglikelihood(short, PAIRS[4:5])
    assert count < 24 < len(tokens)
    assert found[0] == pytest.approx(by(direct(model, tokens[-25:]), tokens[-25:], count)[0], rel=1e-4)


def test_rolling_windows_predict_every_token_once(model: gpt_oss.GptOss, tokenizer: Any) -> None:
    text = "You may obtain a copy of the License at any time."
    tokens = encode(tokenizer, text)
    length = len(tokens) // 2 + 2
    rolling = HarnessModel(model, tokenizer, adapter=-1, max_length=length)
    found = rolling.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,), ("",)]), disable_tqdm=True)
    first, last = [END_OF_TEXT, *tokens[:length]], tokens[-length - 1 :]
    rest = len(tokens) - length
    want = by(direct(model, first), first, length)[0] + by(direct(model, last), last, rest)[0]
    assert found == [pytest.approx(want, rel=1e-4), 0.0]


@pytest.mark.slow
def test_generated_text_is_cut_at_its_stop_string(base: HarnessModel, model: gpt_oss.GptOss, tokenizer: Any) -> None:
    prompts = ["You may obtain", "", "The Apache License, Version 2.0 is"]
    ids = [encode(tokenizer, prompt) or [END_OF_TEXT] for prompt in prompts]
    greedy = gpt_oss.generate(model, ids, max_new_tokens=16, stop_tokens=[END_OF_TEXT], adapter_ids=[-1] * 3)
    whole_texts = [
        tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(greedy.tokens, greedy.lengths, strict=True)
    ]
    stop = whole_texts[0][5:8]
    options = {"until": [stop], "max_gen_toks": 16, "do_sample": False}
    found = base.generate_until(requests("generate_until", [(prompt, options) for prompt in prompts]), True)
    assert found == [text.split(stop)[0] for text in whole_texts]
    assert len(found[0]) <= 5


def test_a_conversation_is_written_by_the_checkpoints_template(base: HarnessModel) -> None:
    question = [{"role": "user", "content": "Hi"}]
    start = base.apply_chat_template(question)
    assert start == "<|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>"
    begun = base.apply_chat_template([*question, {"role": "assistant", "content": "Ho"}], add_generation_prompt=False)
    assert begun == start + "Ho"
    assert base.chat_template(True) == base.tokenizer.chat_template


def test_strings_that_are_special_tokens_stop_too(base: HarnessModel, tokenizer: Any) -> None:
    assert base.stop_tokens(["<|start|>", "License"]) == [END_OF_TEXT, *encode(tokenizer, "<|start|><|return|>")]


def test_given_stop_tokens_stop(model: gpt_oss.GptOss, tokenizer: Any) -> None:
    stopping = HarnessModel(model, tokenizer, adapter=-1, stop_tokens=(3, 5))
    assert stopping.stop_tokens([]) == [stopping.prefix_token_id, 3, 5]


def test_few_sizes_are_compiled() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
    assert [static_width(n) for n in (1, 64, 65, 500, 513, 1025, 4000)] == [64, 64, 128, 512, 640, 1280, 4096]
    assert len({static_width(n) for n in range(1, 8193)}) <= 8 + 4 * 4


@pytest.mark.slow
def test_the_harness_computes_from_what_the_model_answers(base: HarnessModel, tokenizer: Any, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(base, tasks=tasks, task_manager=manager, bootstrap_iters=10)
    assert results is not None
    total = 0.0
    for line in TEXTS:
        tokens = [END_OF_TEXT, *encode(tokenizer, line["text"])]
        (answer,) = base._loglikelihood_tokens([(("", ""), tokens[:1], tokens[1:])], disable_tqdm=True)
        total += answer[0]
    size = sum(len(line["text"].encode()) for line in TEXTS)
    bits = results["results"]["tiny_perplexity"]["bits_per_byte,none"]
    assert bits == pytest.approx(-total / size / math.log(2), rel=1e-4)
    best = [
        max(range(len(sample["resps"])), key=lambda i, sample=sample: sample["resps"][i][0][0])
        for sample in results["samples"]["tiny_choice"]
    ]
    right = [choice == sample["doc"]["answer"] for choice, sample in
             zip(best, results["samples"]["tiny_choice"], strict=True)]  # fmt: skip
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    for sample in results["samples"]["tiny_generation"]:
        assert "License" not in sample["resps"][0][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": 1}, r"adapter must be in \[-1, 1\), got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(model: gpt_oss.GptOss, tokenizer: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HarnessModel(model, tokenizer, **options)


def test_requests_that_do_not_fit(model: gpt_oss.GptOss, tokenizer: Any) -> None:
    short = HarnessModel(model, tokenizer, adapter=-1, max_length=4)
    with pytest.raises(ValueError, match="a continuation must be 1 to 4 tokens, got 5"):
        short._loglikelihood_tokens([(("", ""), [1], [1] * 5)])
    with pytest.raises(ValueError, match="max_gen_toks must be below max_length 4, got 4"):
        short.generate_until(requests("generate_until", [("You", {"max_gen_toks": 4})]), True)
    with pytest.raises(ValueError, match=r"generation takes .*, got \['num_beams'\] too"):
        short.generate_until(requests("generate_until", [("You", {"num_beams": 4})]), True)
