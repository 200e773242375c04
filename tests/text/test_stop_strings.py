"""Text up to the first of some strings, however it is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.text.stop_strings import StopStrings


def run(text: str, strings: list[str], size: int) -> tuple[str, str | None]:
    """(the text that is given out, what has ended it), so many characters at a time."""
    stop = StopStrings(strings)
    given = "".join(stop.push(text[i : i + size]) for i in range(0, len(text), size))
    return given + stop.finish(), stop.found


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_the_text_ends_before_the_string_whose_end_comes_first(size: int) -> None:
    assert run("one two three", ["three", "tw"], size) == ("one ", "tw")
    assert run("abcd", ["abcd", "c"], size) == ("ab", "c")
    assert run("xabc", ["bc", "abc"], size) == ("x", "abc")
    assert run("aab", ["ab"], size) == ("a", "ab")
    assert run("one two", ["two!", ""], size) == ("one two", None)


def test_what_may_be_the_beginning_of_a_string_is_held_back() -> None:
    stop = StopStrings(["END"])
    assert [stop.push(piece) for piece in ("a E", "N", "x", "EN")] == ["a ", "", "ENx", ""]
    assert stop.finish() == "EN"


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.integers(1, 12))
def test_pieces_do_not_matter(text: str, strings: list[str], size: int) -> None:
    assert run(text, strings, size) == run(text, strings, 1)
    whole, found = run(text, strings, 1)
    assert text.startswith(whole + (found or ""))
    assert (found is None) == (not any(string in text for string in strings))
