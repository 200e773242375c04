"""Streams of events as clients read them."""

import json
from typing import Any

import httpx


def chunks_of(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, which must end with [DONE]."""
    answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, nothing = answer.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def texts_of(chunks: list[dict[str, Any]]) -> list[str]:
    """The text of each chunk of a completion."""
    return [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]]
