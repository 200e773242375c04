"""The body of POST /v1/completions."""

from typing import Annotated

from pydantic import Field

from jmoe.serve.protocol.common import GenerationFields, Token

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionRequest(GenerationFields):
    """A text to be continued, or several."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    skip_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, of which a request may have one without a list around it."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]
