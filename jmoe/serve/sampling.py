"""A request's fields to the engine's sampling parameters, within the server's limits."""

from collections.abc import Sequence
from typing import Any

from jmoe.errors import in_short
from jmoe.generation.batches import own_seed
from jmoe.serve.engine import SamplingParams
from jmoe.serve.errors import ApiError
from jmoe.serve.protocol.common import GenerationFields
from jmoe.serve.service import ModelFacts
from jmoe.serve.settings import Limits
from jmoe.text.control_tokens import added_tokens


def check_limits(fields: GenerationFields, limits: Limits, vocab_size: int) -> None:
    """Checks what every request may have too much of.

    Raises:
      ApiError: 400, with the field.
    """
    stops = fields.stop_strings
    if len(stops) > limits.stops or len(fields.stop_token_ids or ()) > limits.stops:
        raise ApiError.invalid("stop", f"stop: at most {limits.stops} strings, or tokens, may end an answer")
    if any(len(stop) > limits.stop_characters for stop in stops):
        raise ApiError.invalid("stop", f"stop: a string must be at most {limits.stop_characters} characters")
    if len(fields.logit_bias or ()) > limits.logit_bias:
        raise ApiError.invalid("logit_bias", f"logit_bias: at most {limits.logit_bias} tokens may be biased")
    if fields.stream_options is not None and not fields.stream:
        raise ApiError.invalid("stream_options", "stream_options: only a stream, with stream=true, has them")
    for token in fields.stop_token_ids or ():
        if token >= vocab_size:
            raise ApiError.invalid("stop_token_ids", f"stop_token_ids: ids must be below {vocab_size}, got {token}")


def check_choices(fields: GenerationFields, prompts: int, limits: Limits) -> int:
    """The number of answers to each prompt.

    Raises:
      ApiError: 400, they are too many.
    """
    n = fields.n or 1
    if n * prompts > limits.choices:
        param = "n" if prompts == 1 else "prompt"
        raise ApiError.invalid(
            param, f"{param}: a request may ask for at most {limits.choices} answers, got {prompts} prompts of n = {n}"
        )
    return n


def check_logprobs(param: str, asked: int | None, limits: Limits) -> None:
    """Raises ApiError, 400, if more alternatives of each token are asked for than there may be."""
    if (asked or 0) > limits.logprobs:
        raise ApiError.invalid(param, f"{param}: at most {limits.logprobs}, got {asked}")


def room(model: ModelFacts, prompt: Sequence[int], max_tokens: int | None, param: str) -> int:
    """The most tokens of an answer: as many as were asked for, or else as fit.

    Raises:
      ApiError: 400, they do not fit.
    """
    left = model.max_model_len - len(prompt)
    if max_tokens is None:
        if left < 1:
            raise ApiError.too_long(param, len(prompt), 0, model.max_model_len)
        return left
    if max_tokens > left:
        raise ApiError.too_long(param, len(prompt), max_tokens, model.max_model_len)
    return max_tokens


def sampling_of(
    fields: GenerationFields,
    model: ModelFacts,
    tokenizer: Any,
    *,
    max_tokens: int,
    sample: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    give_ends: bool = False,
) -> SamplingParams:
    """The parameters of one answer.

    Args:
      sample: the answer's number among a prompt's; each has a seed of its own, if there is a seed.
      give_ends: give tokens that would end the text as others.

    Raises:
      ApiError: 400, with the field: a value is out of range.
    """
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_given(fields.temperature, 1.0),
            top_p=_given(fields.top_p, 1.0),
            top_k=max(_given(fields.top_k, 0), 0),  # vLLM's -1 is all too
            min_p=_given(fields.min_p, 0.0),
            repetition_penalty=_given(fields.repetition_penalty, 1.0),
            presence_penalty=_given(fields.presence_penalty, 0.0),
            frequency_penalty=_given(fields.frequency_penalty, 0.0),
            seed=None if fields.seed is None else own_seed(fields.seed % 2**64, sample),
            logit_bias=_bias(fields.logit_bias or {}, model.vocab_size),
            stop_tokens=() if give_ends else own_stop_tokens(fields, tokenizer),
            ignore_eos=give_ends or bool(fields.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
    except ValueError as error:  # which begins with the field's name
        raise ApiError.of_value(str(error).partition(" ")[0], error) from None


def own_stop_tokens(fields: GenerationFields, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer because the request says so: control tokens among its strings too, as they are in
    no text."""
    control = added_tokens(tokenizer)
    named = [control[each] for each in fields.stop_strings if each in control]
    return tuple(dict.fromkeys([*(fields.stop_token_ids or ()), *named]))


def _given[T](value: T | None, default: T) -> T:
    return default if value is None else value


def _bias(entries: dict[str, float], vocab_size: int) -> dict[int, float]:
    found = {}
    for text, bias in entries.items():
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < vocab_size):
            raise ApiError.invalid(
                "logit_bias", f"logit_bias: keys must be token ids below {vocab_size}, got {in_short(text)}"
            )
        found[int(text)] = bias
    return found
