"""What tasks and the command say about generation, in the harness's words (generation_kwargs)."""

import json
import math
from collections.abc import Mapping
from typing import Any

from jmoe.gpt_oss.sample import Sampling

try:
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import handle_arg_string
except ImportError as missing:
    raise ImportError('evaluation needs the lm-evaluation-harness: pip install "jmoe[eval]"') from missing

PLAIN_LIMIT = 256
"""Tokens of an answer for which nothing else sets a limit, as in the harness."""

CHAT_LIMIT = 2048
"""The same of a reply in a conversation, in which a model may think before it answers."""

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The harness's names for the most tokens of an answer, the first first."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
"""Options of jmoe.gpt_oss.generate, by the same names there."""

WHOLE = {*LIMITS, "top_k", "seed"}
"""Options that are integers."""

KNOWN = {"until", "do_sample", *LIMITS, *SAMPLING}

WITHOUT_EFFECT = {"num_beams": 1}
"""Options of other models, and the value of each that says what is done here."""


def parse(text: str) -> dict[str, Any]:
    """The options in KEY=VALUE,KEY=VALUE as the harness reads them, or in a JSON object.

    Raises:
      ValueError: the text is neither, or check refuses an option.
    """
    if text.lstrip().startswith("{"):
        try:
            options = json.loads(text)
        except ValueError as error:
            raise ValueError(f"generation options must be a JSON object, got {text!r}: {error}") from error
    else:
        pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
        if wrong := [key for key, equals, _ in pairs if not equals or not key.strip()]:
            raise ValueError(f"generation options must be KEY=VALUE with commas between, or JSON, got {wrong[0]!r}")
        options = {key.strip(): handle_arg_string(value) for key, _, value in pairs}
    check(options)
    return options


def check(options: Mapping[str, Any]) -> None:
    """Raises ValueError unless generation knows each of the options and can go by its value."""
    without_effect = {name for name, value in WITHOUT_EFFECT.items() if options.get(name) in (value, None)}
    if unknown := sorted(options.keys() - KNOWN - without_effect):
        raise ValueError(f"generation takes {sorted(KNOWN)}, got {unknown} too")
    until = options.get("until") or []
    if not isinstance(until, str) and not (isinstance(until, list) and all(isinstance(each, str) for each in until)):
        raise ValueError(f"generation option until must be a string or a list of strings, got {until!r}")
    for name in (*LIMITS, *SAMPLING):
        value = options.get(name)
        if value is not None and not is_number(value):
            raise ValueError(f"generation option {name} must be a number, got {value!r}")
        if name in WHOLE and value is not None and value != int(value):
            raise ValueError(f"generation option {name} must be an integer, got {value!r}")
        if name in LIMITS and value is not None and value < 1:
            raise ValueError(f"generation option {name} must be at least 1, got {value!r}")
    said = {name: options[name] for name in SAMPLING if options.get(name) is not None}
    if not 0 <= said.get("seed", 0) < 2**32:
        raise ValueError(f"generation option seed must be in [0, {2**32}), got {said['seed']!r}")
    Sampling.create(
        said.get("temperature", 0.0),
        said.get("top_p", 1.0),
        int(said.get("top_k", 0)),
        said.get("min_p", 0.0),
        said.get("repetition_penalty", 1.0),
    )
    if not isinstance(options.get("do_sample"), bool | None):
        raise ValueError(f"generation option do_sample must be true or false, got {options['do_sample']!r}")


def is_number(value: Any) -> bool:
    """Whether the value is a finite number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def overrides(options: Mapping[str, Any], max_gen_toks: int | None) -> dict[str, Any]:
    """What is said for all tasks, in words that win over each of a task's own.

    Args:
      options: as parse returns them.
      max_gen_toks: the most tokens of an answer, or None.

    Raises:
      ValueError: the limit is said twice, or sampling asks for a temperature that is not said.
    """
    own = {name: value for name, value in options.items() if name not in LIMITS}
    limits = {name: options[name] for name in LIMITS if options.get(name) is not None}
    if max_gen_toks is not None:
        limits["--max-gen-toks"] = max_gen_toks
    if len(set(limits.values())) > 1:
        raise ValueError(f"the most tokens of an answer must be one number, got {limits}")
    if limits:
        own["max_gen_toks"] = int(next(iter(limits.values())))
    temperature = own.get("temperature")
    if own.get("do_sample") and not temperature:
        raise ValueError(f"do_sample=true needs a temperature above 0, got {temperature}")
    if temperature is not None and own.get("do_sample") is None:
        own["do_sample"] = temperature > 0  # a task that says do_sample: false would win else
    return own


def limit(options: Mapping[str, Any]) -> int | None:
    """The most tokens of an answer that the options name."""
    return next((int(options[name]) for name in LIMITS if options.get(name) is not None), None)


def for_generate(options: Mapping[str, Any], default_limit: int) -> tuple[list[str], dict[str, Any]]:
    """(the strings that end an answer, arguments of jmoe.gpt_oss.generate) that a request's options ask for.

    Raises:
      ValueError: as check.
    """
    check(options)
    said = {name: value for name, value in options.items() if value is not None}
    wanted = dict(normalize_gen_kwargs(said, default_limit))
    sampling = {name: wanted[name] for name in SAMPLING if wanted.get(name) is not None}
    for name in ("top_k", "seed"):
        if name in sampling:
            sampling[name] = int(sampling[name])
    return wanted["until"], {"max_new_tokens": wanted["max_gen_toks"], **sampling}
