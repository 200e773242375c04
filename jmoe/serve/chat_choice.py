"""One answer of /v1/chat/completions: what it thinks, calls and says, as tokens come."""

import uuid
from collections.abc import Sequence
from typing import Any, Literal

from jmoe.serve.engine import Finished, Token
from jmoe.serve.token_texts import TokenTexts
from jmoe.text.channels import FINAL, ChannelText
from jmoe.text.reply import Reply

NAMESPACE = "functions."
"""What gpt-oss writes before the name of a request's own function."""

type FinishReason = Literal["stop", "length", "tool_calls"]
type Delta = dict[str, Any]


class ChatChoice:
    """One answer; the pieces of `delta`s put together are its message.

    The final channel is its content, messages to tools are its calls, and all else is its reasoning. It ends with its
    final channel's message, whether or not a token that ends replies follows.

    Attributes:
      finish_reason: None while more may come.
      stop_reason: the string or token that has ended it; None of the model's own end and of the limit.
      new_tokens, cached_tokens: as the engine counts them.
    """

    def __init__(
        self,
        tokenizer: Any,
        token_texts: TokenTexts,
        *,
        stop_strings: Sequence[str] = (),
        logprobs: bool = False,
        own_ends: Sequence[int] = (),
        ends_with_final: bool = True,
    ) -> None:
        """No token yet.

        Args:
          own_ends: tokens that end the text because the request says so.
          ends_with_final: end with the final channel's message.
        """
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.new_tokens = self.cached_tokens = 0
        self.logprobs: list[dict[str, Any]] | None = [] if logprobs else None
        self._reply = Reply(tokenizer, stop_strings)
        self._token_texts = token_texts
        self._own_ends = own_ends
        self._ends_with_final = ends_with_final
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._reasons_in = ""
        self._calls: list[dict[str, Any]] = []

    def token(self, event: Token) -> tuple[Delta, list[dict[str, Any]] | None]:
        """(what a token adds, that may be nothing, its log-probability)."""
        self.new_tokens += 1
        self.cached_tokens = event.cached_tokens
        found = None
        if self.logprobs is not None:
            found = [self._logprob(event)]
            self.logprobs += found
        delta = self._delta(self._reply.push([event.token]))
        if self._reply.stop_string is not None:
            self.finish_reason, self.stop_reason = "stop", self._reply.stop_string
        elif self._ends_with_final and self._reply.final_ended:
            delta = self.joined(delta, self._delta(self._reply.finish()))
            self.finish_reason = "tool_calls" if self._calls else "stop"
        return delta, found

    def finish(self, event: Finished) -> Delta:
        """What was held back until nothing more comes."""
        delta = self._delta(self._reply.finish())
        self.new_tokens, self.cached_tokens = event.new_tokens, event.cached_tokens
        called = event.reason == "stop" and bool(self._calls)
        self.finish_reason = "tool_calls" if called else event.reason
        if self._reply.stop_string is not None:
            self.finish_reason = "stop"
        elif event.stop_token in self._own_ends:
            self.stop_reason = event.stop_token
        return delta

    def message(self) -> dict[str, Any]:
        """All of it."""
        content = "".join(self._content)
        reasoning = "".join(self._reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not self._calls else None,
            "reasoning_content": reasoning or None,
            "refusal": None,
        }
        if self._calls:
            message["tool_calls"] = self._calls
        return message

    def _delta(self, pieces: Sequence[ChannelText]) -> Delta:
        delta: Delta = {}
        for channel, text, recipient in pieces:
            if recipient is None and channel == FINAL:
                self._content.append(text)
                delta["content"] = delta.get("content", "") + text
            elif recipient is None:
                if self._reasoning and channel != self._reasons_in:
                    text = "\n" + text
                self._reasons_in = channel
                self._reasoning.append(text)
                delta["reasoning_content"] = delta.get("reasoning_content", "") + text
        if calls := self._new_of_calls():
            delta["tool_calls"] = calls
        return delta

    def _new_of_calls(self) -> list[dict[str, Any]]:
        """What is new of the calls: of one that has begun its name too."""
        new: list[dict[str, Any]] = []
        for i, call in enumerate(self._reply.calls):
            if i == len(self._calls):
                name = (call.recipient or "").removeprefix(NAMESPACE)
                function = {"name": name, "arguments": call.text}
                begun = {"id": f"call_{uuid.uuid4().hex}", "type": "function"}
                self._calls.append({**begun, "function": function})
                new.append({"index": i, **begun, "function": dict(function)})
                continue
            function = self._calls[i]["function"]
            if added := call.text[len(function["arguments"]) :]:
                function["arguments"] = call.text
                new.append({"index": i, "function": {"arguments": added}})
        return new

    def joined(self, delta: Delta, more: Delta) -> Delta:
        """Both pieces as one."""
        joined = dict(delta)
        for name, value in more.items():
            joined[name] = joined[name] + value if name in joined else value
        return joined

    def _logprob(self, event: Token) -> dict[str, Any]:
        entry = self._entry(event.token, event.logprob)
        return {**entry, "top_logprobs": [self._entry(token, value) for token, value in event.top]}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._token_texts.text(token),
            "logprob": logprob,
            "bytes": list(self._token_texts.bytes(token)),
        }
