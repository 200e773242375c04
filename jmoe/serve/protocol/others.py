"""The bodies of the paths that generate nothing."""

from typing import Annotated, Any

from pydantic import Field

from jmoe.serve.protocol.common import Body, Tokens
from jmoe.text import ReasoningEffort


class TokenizeRequest(Body):
    """A text, or a conversation, to be cut into tokens."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    reasoning_effort: ReasoningEffort | None = None


class DetokenizeRequest(Body):
    """Tokens to be joined to text."""

    model: str | None = None
    tokens: Tokens


class LoadAdapterRequest(Body):
    """An adapter to be loaded, and the name that requests shall call it by."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1)]


class UnloadAdapterRequest(Body):
    """An adapter to be dropped."""

    lora_name: str
