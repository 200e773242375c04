"""One answer of /v1/completions: its text and log-probabilities as tokens come."""

from collections.abc import Sequence
from typing import Any, Literal

from jmoe.serve.engine import Finished, PromptLogprobs, PromptToken, Token
from jmoe.serve.token_texts import TokenTexts
from jmoe.text.reply import Reply
from jmoe.text.stream import TextStream

type FinishReason = Literal["stop", "length"]
type Logprobs = dict[str, list[Any]]


class CompletionChoice:
    """One answer.

    Attributes:
      finish_reason: None while more may come.
      stop_reason: the string or token that has ended it; None of the model's own end and of the limit.
      text: all so far, the prompt's too if it is echoed.
      echoed: whether it begins with its prompt.
      new_tokens, cached_tokens: as the engine counts them.
    """

    def __init__(
        self,
        tokenizer: Any,
        token_texts: TokenTexts,
        *,
        stop_strings: Sequence[str] = (),
        show_special: bool = False,
        logprobs: bool = False,
        ends: Sequence[int] = (),
        own_ends: Sequence[int] = (),
    ) -> None:
        """No text yet.

        Args:
          show_special: write special tokens into the text.
          ends: tokens that end the text, though the engine gives them as others (one token's log-probability is
            wanted whatever it is).
          own_ends: tokens that end the text because the request says so.
        """
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.text = ""
        self.echoed = False
        self.new_tokens = self.cached_tokens = 0
        self.logprobs: Logprobs | None = _empty() if logprobs else None
        self._reply = Reply(tokenizer, stop_strings, form="tokens" if show_special else "text")
        self._show_special = show_special
        self._tokenizer = tokenizer
        self._token_texts = token_texts
        self._ends, self._own_ends = ends, own_ends
        self._ended_by: int | None = None

    def echo(self, prompt: Sequence[int], text: str | None, logprobs: PromptLogprobs | None) -> None:
        """Begins the answer with its prompt.

        Args:
          text: the prompt as it was given; None: as tokens.
        """
        self.echoed = True
        if self.logprobs is not None and logprobs is not None:
            stream = TextStream(self._tokenizer, show_special=True)
            offset = 0
            for token, entry in zip(prompt, logprobs.entries, strict=True):
                self._add_logprobs(self.logprobs, token, entry, offset)
                offset += len(stream.push([token]))
        self.text += self._tokenizer.decode(list(prompt), skip_special_tokens=False) if text is None else text

    def token(self, event: Token) -> tuple[str, Logprobs | None]:
        """(the text that a token adds, that may be nothing, its log-probabilities)."""
        self.new_tokens += 1
        self.cached_tokens = event.cached_tokens
        found = None
        if self.logprobs is not None:
            found = _empty()
            self._add_logprobs(found, event.token, event, len(self.text))
            for name, values in found.items():
                self.logprobs[name] += values
        if event.token in self._ends:
            self._ended_by = event.token
            return "", found
        text = self._keep(self._reply.push([event.token]))
        if self._reply.stop_string is not None:
            self.finish_reason, self.stop_reason = "stop", self._reply.stop_string
        return text, found

    def finish(self, event: Finished) -> str:
        """The text that was held back until nothing more comes."""
        rest = self._keep(self._reply.finish())
        self.finish_reason = "stop" if self._reply.stop_string is not None else event.reason
        self.new_tokens, self.cached_tokens = event.new_tokens, event.cached_tokens
        ended_by = event.stop_token if self._ended_by is None else self._ended_by
        if self._ended_by is not None:
            self.finish_reason = "stop"
        if ended_by in self._own_ends:
            self.stop_reason = ended_by
        return rest

    def _keep(self, pieces: Sequence[Any]) -> str:
        text = "".join(piece.text for piece in pieces)
        self.text += text
        return text

    def _add_logprobs(self, logprobs: Logprobs, token: int, entry: PromptToken | Token | None, offset: int) -> None:
        """Adds a token; None of the first, which nothing predicts."""
        name = self._token_texts.text(token)
        logprobs["tokens"].append(name)
        logprobs["text_offset"].append(offset)
        logprobs["token_logprobs"].append(None if entry is None else entry.logprob)
        if entry is None:
            logprobs["top_logprobs"].append(None)
            return
        # The likeliest first, and the token itself, which may be none of them.
        top: dict[str, float | None] = {}
        for each, value in (*entry.top, (token, entry.logprob)):
            top.setdefault(self._token_texts.text(each), value)
        logprobs["top_logprobs"].append(top)

    def body(self, index: int) -> dict[str, Any]:
        """The choice in an answer's JSON."""
        return choice(index, self.text, self.logprobs, self.finish_reason, self.stop_reason)


def choice(
    index: int, text: str, logprobs: Logprobs | None, finish_reason: FinishReason | None, stop_reason: str | int | None
) -> dict[str, Any]:
    """A choice, or a piece of one, in JSON."""
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


def _empty() -> Logprobs:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
