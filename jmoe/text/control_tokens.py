"""Control tokens that people write in their words: marked there, so that they stay text."""

import itertools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

MARK = "\ufdd0"
"""Stands within a control token that is text. Unicode has it as no character, for programs' own use."""


class ControlTokens(NamedTuple):
    """The texts that a tokenizer turns into one token each, whatever stands beside them.

    Fields:
      found: matches them, at each place the longest.
      starts: matches nothing, at each place where one begins, so that those that overlap are found too.
      beginnings, ends: what they begin and end with, the whole left out.
    """

    texts: tuple[str, ...]
    found: re.Pattern[str]
    starts: re.Pattern[str]
    beginnings: frozenset[str]
    ends: frozenset[str]


_known: WeakKeyDictionary[Any, tuple[int, ControlTokens]] = WeakKeyDictionary()


def control_tokens(tokenizer: Any) -> ControlTokens:
    """The tokenizer's added tokens, but for whitespace and single characters, which are text in every tokenizer."""
    size, tokens = _known.get(tokenizer, (-1, None))
    if tokens is None or size != len(tokenizer):
        texts = [token.content for token in tokenizer.added_tokens_decoder.values()]
        tokens = _of_texts(sorted({text for text in texts if len(text) > 1 and not text.isspace()}, key=_longest_first))
        _known[tokenizer] = (len(tokenizer), tokens)
    return tokens


_ids: WeakKeyDictionary[Any, tuple[int, Mapping[str, int]]] = WeakKeyDictionary()


def added_tokens(tokenizer: Any) -> Mapping[str, int]:
    """The ids of the tokenizer's added tokens, which its own `get_added_vocab` sorts again each time: gpt-oss has a
    thousand."""
    size, ids = _ids.get(tokenizer, (-1, None))
    if ids is None or size != len(tokenizer):
        ids = MappingProxyType(tokenizer.get_added_vocab())
        _ids[tokenizer] = (len(tokenizer), ids)
    return ids


def _longest_first(text: str) -> tuple[int, str]:
    return -len(text), text


def _of_texts(texts: Sequence[str]) -> ControlTokens:
    any_of = "|".join(map(re.escape, texts)) or r"(?!)"
    return ControlTokens(
        tuple(texts),
        re.compile(any_of),
        re.compile(f"(?=({any_of}))"),
        frozenset(text[:i] for text in texts for i in range(1, len(text))),
        frozenset(text[i:] for text in texts for i in range(1, len(text))),
    )


def mark_within(tokens: ControlTokens, value: Any) -> Any:
    """The JSON-like value with a mark behind the first character of each control token in its strings and keys."""
    return _map_strings(value, lambda text: _mark_string(tokens, text, edges=False))


def mark_all(tokens: ControlTokens, value: Any) -> Any:
    """As mark_within; strings that could make a control token with what stands beside them have marks at those ends.

    Where no token is made there, `keep_within` takes them away again.
    """
    return _map_strings(value, lambda text: _mark_string(tokens, text, edges=True))


def _map_strings(value: Any, change: Any) -> Any:
    match value:
        case str():
            return change(value)
        case Mapping():
            return {
                change(key) if isinstance(key, str) else key: _map_strings(part, change) for key, part in value.items()
            }
        case list() | tuple():
            return [_map_strings(part, change) for part in value]
    return value


def _mark_string(tokens: ControlTokens, text: str, *, edges: bool) -> str:
    places = {found.start() + 1 for found in tokens.starts.finditer(text)}
    if edges:
        places |= _open_edges(tokens, text)
    return _insert(text, places)


def _open_edges(tokens: ControlTokens, text: str) -> set[int]:
    """The ends of a text, 0 and its length, at which it could be a part of a control token.

    Words of letters and digits do not count: templates compare them, and none writes the rest of a token around them.
    """
    longest = len(tokens.texts[0]) if tokens.texts else 0
    cuts = range(1, min(longest, len(text) + 1))
    edges = set()
    if any(text[:cut] in tokens.ends and _has_sign(text[:cut]) for cut in cuts):
        edges.add(0)
    if any(text[-cut:] in tokens.beginnings and _has_sign(text[-cut:]) for cut in cuts):
        edges.add(len(text))
    if _has_sign(text) and len(text) < longest and any(text in token[1:-1] for token in tokens.texts):
        edges |= {0, len(text)}
    return edges


def _has_sign(text: str) -> bool:
    return not text.replace("_", "a").isalnum() and bool(text)


def _insert(text: str, places: set[int]) -> str:
    """The text with marks before the characters at some places."""
    cuts = [0, *sorted(places), len(text)]
    return MARK.join(text[a:b] for a, b in itertools.pairwise(cuts)) if places else text


def keep_within(tokens: ControlTokens, text: str) -> str:
    """The text without the marks that stand in no control token."""
    bare = text.replace(MARK, "")
    within = {place for found in tokens.starts.finditer(bare) for place in range(found.start(1) + 1, found.end(1))}
    parts = text.split(MARK)
    places = set()
    end = 0
    for part in parts[:-1]:
        end += len(part)
        if end in within:
            places.add(end)
    return _insert(bare, places)


def stretches(tokens: ControlTokens, text: str) -> list[tuple[str, bool]]:
    """The text cut into parts, each with whether the control tokens in it are text, as their marks said that are gone.

    The other parts are for the tokenizer as they are.
    """
    parts: list[tuple[str, bool]] = []
    begin = done = 0
    for start, stop in [*(found.span() for found in tokens.found.finditer(text)), (len(text), len(text))]:
        stretch = text[begin:start]
        bare = stretch.replace(MARK, "")
        if bare != stretch and tokens.found.search(bare):
            parts += [(text[done:begin], False), (bare, True)]
            done = start
        begin = stop
    return [*parts, (text[done:], False)]
