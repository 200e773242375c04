"""POST /v1/completions, by an engine whose tokens are known."""

import math
from typing import Any

import pytest

from jmoe.text import encode, load_tokenizer
from tests.serve.conftest import WORDS
from tests.serve.fake_engine import LOGPROB, FakeEngine
from tests.serve.serving import TINY, Serving
from tests.serve.streams import chunks_of, texts_of

TOKENIZER = load_tokenizer(TINY)
PATH = "/v1/completions"


def ask(server: Serving, **body: Any) -> dict[str, Any]:
    with server.client() as client:
        answer = client.post(PATH, json={"model": "base", "prompt": "You may", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_text_follows_a_prompt(server: Serving, engine: FakeEngine, text_tokens: list[int]) -> None:
    answer = ask(server, max_tokens=100)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "base"
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["index"]) == (WORDS, "stop", 0)
    prompt = len(encode(TOKENIZER, "You may"))
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, len(text_tokens))
    assert usage["total_tokens"] == prompt + len(text_tokens)
    (request,) = engine.requests
    assert list(request.prompt) == encode(TOKENIZER, "You may")
    assert request.adapter is None


def test_without_a_limit_there_are_16_tokens(server: Serving, engine: FakeEngine) -> None:
    engine.script = lambda request: [7] * 100
    answer = ask(server)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_stream_has_a_chunk_a_token_and_usage_in_the_last(server: Serving, text_tokens: list[int]) -> None:
    body = {"prompt": "You may", "max_tokens": len(text_tokens), "stream_options": {"include_usage": True}}
    with server.client() as client:
        *chunks, last = chunks_of(client, PATH, body)
    assert "".join(texts_of(chunks)) == WORDS
    assert len(chunks) == len(text_tokens)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(text_tokens)
    assert {chunk["id"] for chunk in [*chunks, last]} == {last["id"]}


def test_a_stream_without_usage_has_none(server: Serving) -> None:
    with server.client() as client:
        chunks = chunks_of(client, PATH, {"prompt": "You may"})
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


def test_parts_of_a_character_have_chunks_without_text(server: Serving, engine: FakeEngine) -> None:
    tokens = encode(TOKENIZER, "é")
    assert len(tokens) == 2
    engine.script = lambda request: tokens
    with server.client() as client:
        chunks = chunks_of(client, PATH, {"prompt": "x", "max_tokens": 2, "logprobs": 0})
    assert texts_of(chunks) == ["", "é"]
    names = [chunk["choices"][0]["logprobs"]["tokens"][0] for chunk in chunks]
    assert names == ["bytes:\\xc3", "bytes:\\xa9"]


def test_prompts_are_texts_or_tokens_alone_or_several(server: Serving, engine: FakeEngine) -> None:
    for prompt, expected in (
        ([7, 8, 9], [[7, 8, 9]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
        (["You", "may"], [encode(TOKENIZER, "You"), encode(TOKENIZER, "may")]),
    ):
        engine.requests.clear()
        answer = ask(server, prompt=prompt)
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert [list(request.prompt) for request in engine.requests] == expected
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_n_answers_have_seeds_of_their_own(server: Serving, engine: FakeEngine) -> None:
    answer = ask(server, prompt=["a", "b"], n=2, seed=7)
    assert len(answer["choices"]) == 4
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds[:2] == seeds[2:]
    assert seeds[0] == 7
    assert seeds[1] not in (7, None)
    assert answer["usage"]["prompt_tokens"] == 2


def test_a_prompts_cached_tokens_count_once_whatever_its_answers_share(server: Serving, engine: FakeEngine) -> None:
    cached = {"0": 0, "1": 4, "2": 3, "3": 4}  # of the first prompt's answers, then of the second's
    engine.cached = lambda request: cached[request.id.rpartition("-")[2]]
    usage = ask(server, prompt=[[7] * 5, [8] * 5], n=2)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0 + 3
    assert usage["prompt_tokens"] == 10


def test_an_answer_that_a_string_ends_says_what_of_its_prompt_was_cached(server: Serving, engine: FakeEngine) -> None:
    engine.cached = lambda request: 4
    answer = ask(server, prompt=[7] * 5, stop=" License", max_tokens=40)
    assert answer["choices"][0]["stop_reason"] == " License"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


def test_echo_with_logprobs_is_what_scores_texts(server: Serving, engine: FakeEngine) -> None:
    # As lm-eval asks: the prompt's tokens and one more, whatever it is, the end of the text too.
    engine.script = lambda request: []
    answer = ask(server, prompt=[[45, 78, 226]], max_tokens=1, logprobs=1, echo=True, temperature=0)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None, LOGPROB, LOGPROB, LOGPROB]
    assert logprobs["top_logprobs"][0] is None
    assert all(
        max(top.values()) == value
        for top, value in zip(logprobs["top_logprobs"][1:], logprobs["token_logprobs"][1:], strict=True)
    )
    assert logprobs["tokens"] == [*(TOKENIZER.decode([token]) for token in (45, 78, 226)), "<|endoftext|>"]
    assert answer["choices"][0]["text"] == TOKENIZER.decode([45, 78, 226])
    assert answer["choices"][0]["finish_reason"] == "stop"
    offsets = [len(TOKENIZER.decode([45, 78, 226][:i])) for i in range(4)]
    assert logprobs["text_offset"] == offsets


def test_echo_alone_needs_no_new_tokens(server: Serving) -> None:
    answer = ask(server, max_tokens=0, echo=True)
    assert answer["choices"][0]["text"] == "You may"
    assert answer["usage"]["completion_tokens"] == 0


def test_a_stream_begins_with_the_echo(server: Serving) -> None:
    with server.client() as client:
        chunks = chunks_of(client, PATH, {"prompt": "You may", "echo": True, "max_tokens": 100, "logprobs": 2})
    assert texts_of(chunks)[0] == "You may"
    assert "".join(texts_of(chunks)) == "You may" + WORDS
    assert chunks[0]["choices"][0]["logprobs"]["token_logprobs"][0] is None
    assert all(len(chunk["choices"][0]["logprobs"]["top_logprobs"][0]) in (2, 3) for chunk in chunks[1:-1])


@pytest.mark.parametrize("stop", ["each", ["nothing", "each"], ["each", *(f"stop {i}" for i in range(20))]])
def test_a_string_ends_the_text_before_it(server: Serving, engine: FakeEngine, stop: Any) -> None:
    answer = ask(server, stop=stop, max_tokens=100)
    choice = answer["choices"][0]
    assert choice["text"] == WORDS[: WORDS.index("each")]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "each")
    assert engine.is_empty(5)


def test_no_strings_end_nothing(server: Serving) -> None:
    assert ask(server, stop=[], max_tokens=100)["choices"][0]["text"] == WORDS


def test_a_control_token_among_the_strings_ends_the_text_as_a_token(server: Serving, engine: FakeEngine) -> None:
    end = TOKENIZER.convert_tokens_to_ids("<|end|>")
    engine.script = lambda request: [*encode(TOKENIZER, "You"), end, *encode(TOKENIZER, "may")]
    answer = ask(server, stop=["<|end|>"], max_tokens=100)
    assert answer["choices"][0]["text"] == "You"
    assert answer["choices"][0]["stop_reason"] == end
    assert ask(server, max_tokens=100)["choices"][0]["text"] == "Youmay"
    assert ask(server, max_tokens=100, skip_special_tokens=False)["choices"][0]["text"] == "You<|end|>may"


def test_fields_reach_the_engine(server: Serving, engine: FakeEngine) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": -0.4, "seed": 11, "ignore_eos": True, "max_tokens": 3, "logprobs": 2,
    }  # fmt: skip
    ask(server, **fields, logit_bias={"7": -100, "9": 1.5}, stop_token_ids=[12])
    sampling = engine.requests[-1].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == {7: -100, 9: 1.5}
    assert sampling.stop_tokens == (12,)


def test_nulls_and_unknown_fields_are_as_if_they_were_not_there(server: Serving, engine: FakeEngine) -> None:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs", "stop", "n", "suffix")
    ask(server, **dict.fromkeys(names), user="somebody", guided_choice=["a"], store=None)
    sampling = engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (1.0, 1.0, 0, None)


def test_ignore_eos_goes_on(server: Serving) -> None:
    answer = ask(server, ignore_eos=True, max_tokens=30)
    assert answer["usage"]["completion_tokens"] == 30
    assert answer["choices"][0]["finish_reason"] == "length"


def test_an_adapter_is_asked_for_as_model(server: Serving, engine: FakeEngine) -> None:
    assert ask(server, model="tuned")["model"] == "tuned"
    assert engine.requests[-1].adapter == "tuned"
    ask(server, model="base-too")
    assert engine.requests[-1].adapter is None


def test_an_engine_that_fails_is_an_error_500_or_one_in_the_stream(server: Serving, engine: FakeEngine) -> None:
    engine.fails = "the logits are not finite"
    with server.client() as client:
        answer = client.post(PATH, json={"prompt": "x"})
        (chunk,) = chunks_of(client, PATH, {"prompt": "x"})
    assert answer.status_code == 500
    assert answer.json()["error"] == chunk["error"]
    assert chunk["error"]["message"] == engine.fails


def test_logprobs_are_finite_json(server: Serving) -> None:
    logprobs = ask(server, logprobs=5, max_tokens=4)["choices"][0]["logprobs"]
    assert all(math.isfinite(value) for value in logprobs["token_logprobs"])
    assert all(len(top) in (5, 6) for top in logprobs["top_logprobs"])
