"""A conversation as the chat template writes it, cut into what is learnt and what is not."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jmoe.text import Message, chat_text


class Writer(NamedTuple):
    """The chat template with the tools of one conversation."""

    tokenizer: Any
    tools: Sequence[Mapping[str, Any]]

    def __call__(self, messages: Sequence[Message], *, reply: bool) -> str:
        return chat_text(self.tokenizer, messages, reply=reply, tools=self.tools)


class Piece(NamedTuple):
    """A part of a row's text, encoded apart from the others."""

    text: str
    trained: bool


def conversation_pieces(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    untrained: Collection[int] = (),
) -> list[Piece]:
    """The conversation as the chat template writes it, cut where each of the assistant's turns begins and ends.

    A turn begins where the turns before it end, followed by the header of a reply. It ends where another reply's header
    would begin, or with the text. gpt-oss ends the last turn with another token than the ones before, whose thinking it
    leaves out; so each is found in the text as a turn with others to come.

    Args:
      tools: functions for the template.
      untrained: turns of the assistant that are not trained, by their place among the messages.

    Raises:
      ValueError: the template refuses the messages, or does not write the turns up to some point as the beginning of
        the whole.
    """
    write = Writer(tokenizer, tools)
    whole = write(messages, reply=False)
    header = _reply_header(write, messages)
    pieces: list[Piece] = []
    end = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin = len(_beginning(write, whole, messages[:turn], header)) + len(header)
        pieces.append(Piece(whole[end:begin], trained=False))
        last = turn == len(messages) - 1
        end = len(whole) if last else len(_beginning(write, whole, messages[: turn + 1], header))
        if not whole.startswith(header, begin - len(header)) or end <= begin:
            raise ValueError(
                f"the chat template must write messages[{turn}] behind a reply's header {header!r}, got "
                f"{whole[begin - len(header) : end][:40]!r}"
            )
        pieces.append(Piece(whole[begin:end], trained=turn not in untrained))
    return [*pieces, Piece(whole[end:], trained=False)]


def _reply_header(write: Writer, messages: Sequence[Message]) -> str:
    """What the template writes for a reply to begin, by the messages before the assistant's first."""
    before = messages[: [message["role"] for message in messages].index("assistant")]
    without, text = (write(before, reply=reply) for reply in (False, True))
    _check_prefix(without, text, "a reply's header must follow the messages")
    return text.removeprefix(without)


def _beginning(write: Writer, whole: str, messages: Sequence[Message], header: str) -> str:
    """The first messages as the template writes them before a reply, the reply's header left out.

    gpt-oss leaves out what led to a tool's call once an answer follows: so does this, where that gives the whole.
    """
    bare = [_call_alone(message) if message.get("tool_calls") else message for message in messages]
    if bare != list(messages):
        text = write(bare, reply=True)
        if text.endswith(header) and whole.startswith(text.removesuffix(header)):
            return text.removesuffix(header)
    text = write(messages, reply=True)
    if not text.endswith(header):
        raise ValueError(
            f"the chat template must begin a reply after messages[:{len(messages)}] with {header!r}, as the first, "
            f"got {text[-40:]!r}"
        )
    beginning = text.removesuffix(header)
    _check_prefix(beginning, whole, f"the text of messages[:{len(messages)}] must stay when more follow")
    return beginning


def _call_alone(message: Message) -> Message:
    """The turn without what led to its call, which may be its thinking or its content."""
    return {name: "" if name == "content" else value for name, value in message.items() if name != "thinking"}


def _check_prefix(beginning: str, whole: str, rule: str) -> None:
    if not whole.startswith(beginning):
        same = next((i for i, (a, b) in enumerate(zip(beginning, whole, strict=False)) if a != b), len(whole))
        raise ValueError(
            f"the chat template does not let replies be told from the rest: {rule}, expected "
            f"{beginning[same : same + 40]!r} at character {same}, got {whole[same : same + 40]!r}"
        )
