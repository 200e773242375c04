"""What tasks and the command say about generation."""

from typing import Any

import pytest

from jmoe.evaluate.generation_options import check, for_generate, overrides, parse


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("temperature=0.7,top_p=0.9,do_sample=true", {"temperature": 0.7, "top_p": 0.9, "do_sample": True}),
        ('{"until": ["\\n\\n", "a,b"], "top_k": 5}', {"until": ["\n\n", "a,b"], "top_k": 5}),
        ("max_tokens=9, until=a=b", {"max_tokens": 9, "until": "a=b"}),
    ],
)
def test_options_are_pairs_or_json(text: str, options: dict[str, Any]) -> None:
    assert parse(text) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperature", "must be KEY=VALUE with commas between, or JSON, got 'temperature'"),
        ('{"top_k": ', "must be a JSON object"),
        ("typical_p=0.9,num_beams=2", r"generation takes \[.*'min_p'.*\], got \['num_beams', 'typical_p'\] too"),
        ("temperature=warm", "temperature must be a number, got 'warm'"),
        ("top_k=1.5", "top_k must be an integer, got 1.5"),
        ("max_gen_toks=0", "max_gen_toks must be at least 1, got 0"),
        ("max_gen_toks=nan", "max_gen_toks must be a number, got nan"),
        ("temperature=-1", "temperature must be 0 or more, got -1"),
        ("seed=-1", r"seed must be in \[0, 4294967296\), got -1"),
        ("until=3", "until must be a string or a list of strings, got 3"),
        ("do_sample=maybe", "do_sample must be true or false, got 'maybe'"),
        ("top_p=true", "top_p must be a number, got True"),
    ],
)
def test_an_option_that_is_not_known_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_options_of_other_models_without_an_effect_pass() -> None:
    check({"num_beams": 1, "temperature": None, "until": None})


@pytest.mark.parametrize(
    ("options", "limit", "wanted"),
    [
        ({}, None, {}),
        ({}, 64, {"max_gen_toks": 64}),
        ({"max_new_tokens": 64.0}, None, {"max_gen_toks": 64}),
        ({"max_tokens": 64}, 64, {"max_gen_toks": 64}),
        ({"temperature": 0.7}, None, {"temperature": 0.7, "do_sample": True}),
        ({"temperature": 0}, None, {"temperature": 0, "do_sample": False}),
        ({"top_k": 4}, None, {"top_k": 4}),
    ],
)
def test_what_the_command_says_wins_in_the_tasks_own_words(
    options: dict[str, Any], limit: int | None, wanted: dict[str, Any]
) -> None:
    assert overrides(options, limit) == wanted


@pytest.mark.parametrize(
    ("options", "limit", "message"),
    [
        ({"max_tokens": 64}, 65, "must be one number, got {'max_tokens': 64, '--max-gen-toks': 65}"),
        ({"do_sample": True}, None, "do_sample=true needs a temperature above 0, got None"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], limit: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overrides(options, limit)


def test_a_requests_options_are_those_of_generate() -> None:
    options = {"until": "a", "max_tokens": 5, "do_sample": True, "temperature": 0.5, "top_k": 3.0, "min_p": 0.1}
    options |= {"repetition_penalty": 1.2, "seed": 7, "num_beams": 1, "top_p": None}
    until, wanted = for_generate(options, 256)
    assert until == ["a"]
    assert wanted == {
        "max_new_tokens": 5, "temperature": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 7,
    }  # fmt: skip
    assert for_generate({}, 256) == ([], {"max_new_tokens": 256})
    assert for_generate({"temperature": 0.5, "do_sample": False}, 256)[1]["temperature"] == 0.0
