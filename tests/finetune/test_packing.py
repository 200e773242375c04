"""Examples packed into rows: every target once, none across examples, little padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.finetune.examples import Example
from jmoe.finetune.packing import best_fit, pack

LENGTH = 8


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    """Examples whose tokens are all different, so that each can be told wherever it lands."""
    sizes = draw(st.lists(st.integers(2, LENGTH + 1), min_size=1, max_size=20))
    found, first = [], 1
    for size in sizes:
        trained = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        found.append(Example(np.arange(first, first + size, dtype=np.int32), np.array(trained)))
        first += size
    return found


@given(examples())
def test_every_trained_target_appears_once_with_its_own_past(rows: list[Example]) -> None:
    packed = pack(rows, LENGTH)
    assert [array.dtype for array in packed] == [np.int32, np.int32, np.float32, np.int32]
    assert {array.shape for array in packed} == {(len(packed.tokens), LENGTH)}
    seen = []
    for tokens, targets, weights, segments in zip(*packed, strict=True):
        assert segments[0] == 1
        assert set(np.diff(segments)) <= {0, 1}
        for segment in range(1, segments[-1] + 1):
            here = segments == segment
            if tokens[here][0] == 0:  # padding
                assert segment == segments[-1]
                assert not tokens[here].any()
                assert not targets[here].any()
                assert not weights[here].any()
                continue
            seen.append((*tokens[here], targets[here][-1]))
            (example,) = (row for row in rows if row.tokens[0] == tokens[here][0])
            np.testing.assert_array_equal(tokens[here], example.tokens[:-1])
            np.testing.assert_array_equal(targets[here], example.tokens[1:])
            np.testing.assert_array_equal(weights[here], example.trained[1:])
    assert sorted(seen) == [tuple(row.tokens) for row in rows]


@given(st.lists(st.integers(1, LENGTH), min_size=1))
def test_bins_hold_everything_and_no_two_could_be_one(sizes: list[int]) -> None:
    bins = best_fit(sizes, LENGTH)
    assert sorted(index for members in bins for index in members) == list(range(len(sizes)))
    filled = sorted(sum(sizes[index] for index in members) for members in bins)
    assert filled[-1] <= LENGTH
    assert len(filled) < 2 or filled[0] + filled[1] > LENGTH


def test_many_examples_leave_little_padding() -> None:
    sizes = np.random.default_rng(0).integers(1, 2048, 20_000)
    assert len(best_fit(sizes, 2048)) * 2048 < 1.01 * sizes.sum()


@pytest.mark.parametrize(("tokens", "length"), [(1, 8), (10, 8)])
def test_an_example_that_does_not_fit_is_named(tokens: int, length: int) -> None:
    good, bad = (Example(np.zeros(n, np.int32), np.ones(n, bool)) for n in (3, tokens))
    with pytest.raises(ValueError, match=rf"must have 2 to 9 tokens .* got {tokens} in examples\[1\] \(1 of 2"):
        pack([good, bad], length)


def test_nothing_to_pack_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one example, got none"):
        pack([], 8)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        pack([], 0)
