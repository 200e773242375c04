"""Fields that completions and chat completions share."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
"""Numbers beyond it may have thousands of digits, which Python refuses to write into an error."""

PositiveCount = Annotated[int, Field(ge=1, lt=2**63)]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


MOST_ITEMS = 10_000
"""Of lists whose own limits are lower and say so; a list of millions is refused by its length alone."""

SHORT = Field(max_length=MOST_ITEMS, fail_fast=True)

LONG_BYTES = 2**17
"""Tokenizers read some MB a second."""


class Body(BaseModel):
    """A request's JSON: unknown fields are ignored, values are not converted."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)
    _bytes: int = PrivateAttr(0)

    @classmethod
    def read(cls, content: bytes | bytearray) -> Self:
        """Of JSON.

        Raises:
          ValidationError: it is not of this form.
        """
        body = cls.model_validate_json(content)
        body._bytes = len(content)
        return body

    @property
    def is_long(self) -> bool:
        """Whether its text may take long to cut into tokens."""
        return self._bytes > LONG_BYTES


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool | None = None


class GenerationFields(Body):
    """What an answer is asked for; null is as if the field were not there."""

    model: str | None = None
    n: PositiveCount | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: str | Annotated[list[str], SHORT] | None = None
    stop_token_ids: Annotated[list[Token], SHORT] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> list[str]:
        """The strings that end an answer, each once."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return list(dict.fromkeys(stop for stop in stops if stop))

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)
