"""The body of POST /v1/completions."""

from typing import Annotated

from jmoe.serve.protocol.common import SHORT, Count, GenerationFields, PositiveCount, Tokens

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionRequest(GenerationFields):
    """A text to be continued, or several."""

    prompt: str | Annotated[list[str], SHORT] | Tokens | Annotated[list[Tokens], SHORT]
    max_tokens: Count | None = None
    logprobs: Count | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: PositiveCount | None = None
    skip_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, of which a request may have one without a list around it."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]
