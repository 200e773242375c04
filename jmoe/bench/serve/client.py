"""Requests to /v1/completions, streamed, and when each chunk came."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from jmoe.bench.serve.load import Load, Work, words, works

WORDS = 2000
MOST_SECONDS = 6 * 3600


@dataclasses.dataclass
class Outcome:
    """How one request went; times are seconds of one clock.

    Attributes:
      begun: when it was sent.
      came: when each chunk with a choice came.
      prompt_tokens, output_tokens: by the server's usage.
      error: why it failed; None if it did not.
    """

    begun: float = 0.0
    came: list[float] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


async def ask_all(load: Load, key: str | None) -> tuple[list[Outcome], float]:
    """(how each request went, seconds from the first to the end of the last), warm-ups before left out.

    Raises:
      OSError: the server cannot be reached, or refuses to say what is needed.
    """
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    connector = aiohttp.TCPConnector(limit=load.concurrency)
    timeout = aiohttp.ClientTimeout(total=MOST_SECONDS)
    async with aiohttp.ClientSession(load.url, headers=headers, connector=connector, timeout=timeout) as session:
        models = load.models or (await first_model(session),)
        tokens = await tokens_of(session, models[0], words(WORDS, load.seed))
        await ask_these(session, load, works(load, tokens, models, load.warm_ups, load.seed + 1))
        begun = time.perf_counter()
        outcomes = await ask_these(session, load, works(load, tokens, models, load.requests, load.seed))
        return outcomes, time.perf_counter() - begun


async def first_model(session: aiohttp.ClientSession) -> str:
    """The first of the server's models."""
    return str((await answer_of(session, "GET", "/v1/models"))["data"][0]["id"])


async def tokens_of(session: aiohttp.ClientSession, model: str, text: str) -> list[int]:
    """The different tokens of a text, by the server's tokenizer."""
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    return sorted(set((await answer_of(session, "POST", "/tokenize", body))["tokens"]))


async def answer_of(session: aiohttp.ClientSession, method: str, path: str, body: Any = None) -> Any:
    """The JSON of an answer.

    Raises:
      OSError: there is none.
    """
    try:
        async with session.request(method, path, json=body) as answer:
            if answer.status != 200:
                raise OSError(f"{method} {path}: {answer.status} {(await answer.text())[:200]}")
            return await answer.json(content_type=None)
    except aiohttp.ClientError as error:
        raise OSError(f"{method} {path}: {error}") from error


async def ask_these(session: aiohttp.ClientSession, load: Load, todo: Sequence[Work]) -> list[Outcome]:
    """Asks them in their order, as many at once as the load says."""
    outcomes = [Outcome() for _ in todo]
    waiting = iter(range(len(todo)))

    async def work_off() -> None:
        for i in waiting:
            await ask(session, todo[i], outcomes[i])

    await asyncio.gather(*(work_off() for _ in range(load.concurrency)))
    return outcomes


async def ask(session: aiohttp.ClientSession, work: Work, outcome: Outcome) -> None:
    """Asks for an answer of exactly so many tokens."""
    body = {
        "model": work.model,
        "prompt": work.prompt,
        "max_tokens": work.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    outcome.begun = time.perf_counter()
    try:
        async with session.post("/v1/completions", json=body) as answer:
            if answer.status != 200:
                outcome.error = f"{answer.status} {(await answer.text())[:200]}"
                return
            async for line in answer.content:
                now = time.perf_counter()
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    note(json.loads(line.removeprefix(b"data: ")), now, outcome)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    if outcome.error is None and not (outcome.came and outcome.output_tokens):
        outcome.error = "the answer has no tokens, or does not say how many"


def note(chunk: Any, now: float, outcome: Outcome) -> None:
    """Notes a chunk: that of a token, or the last with the numbers of tokens."""
    if "error" in chunk:
        outcome.error = str(chunk["error"])
    elif chunk.get("choices"):
        outcome.came.append(now)
    elif usage := chunk.get("usage"):
        outcome.prompt_tokens, outcome.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
