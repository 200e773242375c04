"""An endless stream of batches, and examples held back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.finetune.batches import Batches, digest, split
from jmoe.finetune.packing import Packed


def packed(rows: int) -> Packed:
    """Rows of 3 positions that hold their own number."""
    numbers = np.arange(rows, dtype=np.int32)[:, None].repeat(3, axis=1)
    return Packed(numbers, numbers, numbers.astype(np.float32), numbers)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 3))
def test_each_epoch_has_every_row_once(rows: int, batch_size: int, seed: int) -> None:
    batches = Batches(packed(rows), batch_size, seed)
    steps = [batches.batch(step) for step in range(3 * rows)]
    assert {array.shape for batch in steps for array in batch} == {(batch_size, 3)}
    stream = np.concatenate([batch.tokens[:, 0] for batch in steps]).reshape(-1, rows)
    np.testing.assert_array_equal(np.sort(stream), np.tile(np.arange(rows), (len(stream), 1)))


def test_a_batch_depends_on_its_step_and_seed_alone() -> None:
    first, again, other = Batches(packed(9), 4, 0), Batches(packed(9), 4, 0), Batches(packed(9), 4, 1)
    ahead = [first.batch(step).tokens for step in range(6)]
    for step in reversed(range(6)):
        for got, expected in zip(again.batch(step), first.batch(step), strict=True):
            np.testing.assert_array_equal(got, expected)
    assert any((other.batch(step).tokens != ahead[step]).any() for step in range(6))


def test_epochs_have_different_orders() -> None:
    batches = Batches(packed(20), 20, 0)
    assert (batches.batch(0).tokens != batches.batch(1).tokens).any()


def test_epochs_are_counted() -> None:
    batches = Batches(packed(5), 2, 0)
    assert batches.steps_per_epoch == 3
    assert [batches.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]


def test_batches_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Batches(packed(0), 1, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Batches(packed(1), 0, 0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        Batches(packed(1), 1, -1)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        Batches(packed(1), 1, 0).batch(-1)


def test_a_split_loses_nothing_and_is_repeated() -> None:
    examples = list(range(100))
    train, validation = split(examples, 0.1, seed=3)
    assert len(validation) == 10
    assert sorted(train + validation) == examples
    assert list(train) == sorted(train)
    assert list(validation) == sorted(validation)
    assert split(examples, 0.1, seed=3) == (train, validation)
    assert split(examples, 0.1, seed=4) != (train, validation)
    assert split(examples, 0, seed=3) == (tuple(examples), ())
    assert len(split(examples, 0.001, seed=3)[1]) == 1


def test_a_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="1 examples are too few"):
        split([1], 0.5, seed=0)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got 1"):
        split([1, 2], 1, seed=0)


def test_a_digest_is_of_every_array() -> None:
    rows = Packed(*(np.zeros((2, 3), dtype) for dtype in (np.int32, np.int32, np.float32, np.int32)))
    digests = {digest(rows), digest(rows, rows)}
    for name in rows._fields:
        digests.add(digest(rows._replace(**{name: getattr(rows, name) + 1})))
    assert len(digests) == 6
    assert digest(rows) == digest(Packed(*map(np.copy, rows)))
