"""Examples in rows, and rows in batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.finetune.batches import Batches, split
from jmoe.finetune.examples import Example
from jmoe.finetune.packing import best_fit, pack

LENGTH = 12


def example(number: int, size: int) -> Example:
    """Of tokens that no other example has."""
    trained = np.arange(size) % 3 != 0
    return Example((100 * number + np.arange(size)).astype(np.int32), trained)


@given(st.lists(st.integers(2, LENGTH + 1), min_size=1, max_size=30))
def test_every_trained_token_is_predicted_once_from_its_own_example(sizes: list[int]) -> None:
    examples = [example(number, size) for number, size in enumerate(sizes, start=1)]
    packed = pack(examples, LENGTH)
    counted = packed.weights > 0
    wanted = np.concatenate([one.tokens[1:][one.trained[1:]] for one in examples])
    np.testing.assert_array_equal(np.sort(packed.targets[counted]), np.sort(wanted))
    np.testing.assert_array_equal(packed.targets[counted], packed.tokens[counted] + 1)
    real = packed.tokens > 0
    assert real.sum() == sum(size - 1 for size in sizes)
    for tokens, segments in zip(packed.tokens, packed.segment_ids, strict=True):
        # A segment is one example or the padding, and stands together.
        for segment in np.unique(segments):
            assert len(np.unique(tokens[segments == segment] // 100)) == 1
        assert (np.diff(segments) >= 0).all()


@given(st.lists(st.integers(1, LENGTH), max_size=60))
def test_no_two_bins_fit_into_one(sizes: list[int]) -> None:
    bins = best_fit(sizes, LENGTH)
    assert sorted(index for members in bins for index in members) == list(range(len(sizes)))
    filled = sorted(sum(sizes[index] for index in members) for members in bins)
    assert all(space <= LENGTH for space in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > LENGTH


@pytest.mark.parametrize("sizes", [[1], [LENGTH + 2], []])
def test_examples_that_fit_no_row_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"pack needs|examples must have"):
        pack([example(1, size) for size in sizes], LENGTH)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_each_epoch_sees_every_row_once(rows: int, batch_size: int, seed: int) -> None:
    packed = pack([example(number, LENGTH + 1) for number in range(1, rows + 1)], LENGTH)
    batches = Batches(packed, batch_size, seed)
    stream = np.concatenate([batches.batch(step).tokens[:, 0] for step in range(2 * rows)])
    for epoch in range(2):
        seen = stream[epoch * rows : (epoch + 1) * rows]
        assert sorted(seen.tolist()) == [100 * number for number in range(1, rows + 1)]
    again = Batches(packed, batch_size, seed).batch(rows)
    np.testing.assert_array_equal(again.tokens, batches.batch(rows).tokens)
    assert (batches.steps_per_epoch - 1) * batch_size < rows <= batches.steps_per_epoch * batch_size


def test_orders_differ_between_epochs_and_seeds() -> None:
    packed = pack([example(number, LENGTH + 1) for number in range(1, 21)], LENGTH)
    one, other = Batches(packed, 20, 0), Batches(packed, 20, 1)
    orders = {tuple(batch.tokens[:, 0].tolist()) for batch in (one.batch(0), one.batch(1), other.batch(0))}
    assert len(orders) == 3


def test_what_is_held_back_is_not_trained_on() -> None:
    train, held = split(range(40), 0.1, seed=0)
    assert len(held) == 4
    assert sorted([*train, *held]) == list(range(40))
    assert split(range(40), 0.0, seed=0) == (tuple(range(40)), ())
    assert split(range(40), 0.1, seed=1)[1] != held
    with pytest.raises(ValueError, match="too few to hold back"):
        split(range(1), 0.5, seed=0)
