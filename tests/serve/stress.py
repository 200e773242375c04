"""Many requests of every kind at once, drawn by a seed."""

import asyncio
import collections
import json
import random
from typing import Any

import httpx

AT_ONCE = 24
MODEL_LEN = 512

BAD: tuple[tuple[bytes | dict[str, Any], int], ...] = (
    (b"{", 400),
    (b"\xff", 400),
    ({}, 400),
    ({"prompt": "x", "model": "no-such"}, 404),
    ({"prompt": "x", "temperature": -1}, 400),
    ({"prompt": "x", "n": 0}, 400),
    ({"prompt": [10**9]}, 400),
    ({"prompt": [7] * MODEL_LEN}, 400),
    ({"prompt": "x", "logit_bias": {"x": 1}}, 400),
)


class Stress:
    """Requests to /v1/completions and how they ended.

    Attributes:
      ended: how many were answered whole, streamed, refused as they should be, or left by the client.
      wrong: what was not as it should be.
    """

    def __init__(self, url: str, models: list[str], draw: random.Random, requests: int) -> None:
        self.ended: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._url, self._models, self._draw, self._requests = url, models, draw, requests

    def run(self) -> None:
        """Sends all of them, AT_ONCE at a time."""
        asyncio.run(self._run())

    async def _run(self) -> None:
        works = [self._work() for _ in range(self._requests)]
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=300, limits=limits) as client:

            async def work_off() -> None:
                while works:
                    kind, body, more = works.pop()
                    try:
                        await self._ask(client, kind, body, more)
                    except Exception as error:
                        self.wrong.append(f"{kind} {body!r}: {error!r}")
                        self.ended["error"] += 1

            await asyncio.gather(*(work_off() for _ in range(AT_ONCE)))

    def _work(self) -> tuple[str, Any, Any]:
        """(kind, body, what else is to be known) of a request."""
        draw = self._draw
        kind = draw.choices(["whole", "streamed", "refused", "left"], [4, 4, 1, 2])[0]
        if kind == "refused":
            body, status = draw.choice(BAD)
            return kind, body, status
        prompt, new = draw.randint(1, 20), draw.randint(1, 6)
        if draw.random() < 0.1:  # so long that not all that run at once have pages to the end
            prompt, new = draw.randint(100, 300), draw.randint(40, 80)
        first = draw.choice((7, 8, draw.randint(10, 500)))  # some prompts begin alike
        body = {
            "model": draw.choice(self._models),
            "prompt": [first + i % 7 for i in range(prompt)],
            "max_tokens": new,
            "n": draw.choices([1, 2, 3], [8, 1, 1])[0],
            "temperature": draw.choice([0, 0.7, 1.5]),
            "top_p": draw.choice([1, 0.8]),
            "seed": draw.choice([None, 3]),
            "logprobs": draw.choice([None, None, None, 2]),
            "ignore_eos": draw.random() < 0.7,
            "stream": kind != "whole" and (kind == "streamed" or draw.random() < 0.5),
        }
        if kind == "left":
            return kind, {**body, "max_tokens": 200, "ignore_eos": True}, draw.uniform(0, 0.1)
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        return kind, body, None

    async def _ask(self, client: httpx.AsyncClient, kind: str, body: Any, more: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body)
        if kind == "left":
            try:
                async with asyncio.timeout(more):
                    await client.post("/v1/completions", content=content)
            except TimeoutError:
                pass
            self.ended[kind] += 1
            return
        answer = await client.post("/v1/completions", content=content)
        expected = more if kind == "refused" else 200
        if answer.status_code != expected:
            self.wrong.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
        elif kind == "refused":
            assert answer.json()["error"]["message"]
        elif kind == "whole":
            self._check(body, [(c["index"], c["finish_reason"]) for c in answer.json()["choices"]], answer.json())
        else:
            *events, done, _ = answer.text.split("\n\n")
            assert done == "data: [DONE]"
            chunks = [json.loads(event.removeprefix("data: ")) for event in events]
            ends = [(c["index"], c["finish_reason"]) for chunk in chunks for c in chunk["choices"]]
            self._check(body, [end for end in ends if end[1]], chunks[-1])
        self.ended[kind] += 1

    def _check(self, body: dict[str, Any], ends: list[tuple[int, str]], last: dict[str, Any]) -> None:
        """Each choice has ended once, and the numbers of tokens are possible."""
        assert sorted(index for index, _ in ends) == list(range(body["n"]))
        assert {reason for _, reason in ends} <= {"stop", "length"}
        assert last["usage"]["prompt_tokens"] == len(body["prompt"])
        most = body["n"] * body["max_tokens"]
        assert last["usage"]["completion_tokens"] <= most
        if body["ignore_eos"]:
            assert last["usage"]["completion_tokens"] == most
