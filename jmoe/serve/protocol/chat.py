"""The body of POST /v1/chat/completions."""

from typing import Annotated, Any

from pydantic import Field

from jmoe.serve.protocol.common import Body, Count, GenerationFields, PositiveCount
from jmoe.text import ReasoningEffort


class ResponseFormat(Body):
    """What form the answer shall have; text alone is known."""

    type: str


class ChatRequest(GenerationFields):
    """A conversation to be answered."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: PositiveCount | None = None
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    response_format: ResponseFormat | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of the answer; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
