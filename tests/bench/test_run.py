"""A run on a CPU: failures become cells, and what is measured is what was asked for."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.bench.case import Case, Matrix, Size
from jmoe.bench.figures import Row
from jmoe.bench.implementation import Figures, Implementation, Measure, UnavailableError
from jmoe.bench.jax_timing import scan_microseconds
from jmoe.bench.report import jmoe_failed, line
from jmoe.bench.run import LONGEST_REASON, Measured, implementations, run
from jmoe.bench.weights import Weights, random_adapter_ids

TINY = Matrix(Size(64, 64, 2), (1, 64), (4,), (0, 16))


def everywhere(name: str, measure: Measure, prepared: list[int] | None = None) -> Implementation:
    """An implementation that measures every case, and notes the number of experts each time it is prepared."""

    def prepare(weights: Weights) -> Measure:
        if prepared is not None:
            prepared.append(weights.count)
        return measure

    return Implementation((name,), lambda case: True, prepare)


def test_a_failure_is_a_text_in_its_cells_alone() -> None:
    def fails(case: Case) -> Figures:
        raise RuntimeError("CUDA error: " + "x" * 300 + "\nsecond line")

    def out_of_reach(weights: Weights) -> Measure:
        raise UnavailableError("not installed")

    unavailable = Implementation(("a", "b"), lambda case: True, out_of_reach)
    works = everywhere("works", lambda case: {"works": float(case.tokens)})
    rows = list(run(TINY, [everywhere("fails", fails), unavailable, works]))
    assert [row.case.tokens for row in rows] == [1, 64, 1, 64, 64]
    for row in rows:
        assert row.microseconds["works"] == row.case.tokens
        assert row.microseconds["a"] == row.microseconds["b"] == "not installed"
        reason = str(row.microseconds["fails"])
        assert reason.startswith("RuntimeError: CUDA error: x")
        assert len(reason) == LONGEST_REASON


def test_weights_are_laid_out_once_for_each_number_of_experts() -> None:
    prepared: list[int] = []
    matrix = Matrix(TINY.size, (1, 16, 64), (4, 8), (0, 16, 64))
    rows = list(run(matrix, [everywhere("one", lambda case: {"one": 1.0}, prepared)]))
    assert prepared == [4, 8]
    assert len(rows) == 2 * (3 * 3 + 1)


def test_rows_that_nobody_measures_are_left_out() -> None:
    only_lora = Implementation(("lora",), lambda case: case.rank > 0, lambda weights: lambda case: {"lora": 1.0})
    assert {row.case.rank for row in run(TINY, [only_lora])} == {16}


@pytest.mark.slow
def test_jmoe_is_timed_with_and_without_adapters() -> None:
    ours = [each for each in implementations() if each.names == ("jmoe packed",)]
    for row in run(TINY, ours):
        time = row.microseconds["jmoe packed"]
        assert isinstance(time, float), (row.case, time)
        assert time > 0
        assert not jmoe_failed(row)


def test_ours_failing_is_a_failure_and_a_peers_is_none() -> None:
    assert jmoe_failed(Measured(Case(4, 1), {"jmoe packed": "ValueError: x", "triton_kernels": 2.0}))
    assert not jmoe_failed(Measured(Case(4, 1), {"jmoe packed": 1.0, "triton_kernels": "no GPU"}))


def test_every_step_reads_its_own_logits_and_the_last_steps_result() -> None:
    seen = []

    def step(carry: jax.Array, logits: jax.Array, weights: jax.Array) -> jax.Array:
        jax.debug.callback(lambda *values: seen.append(tuple(map(float, values))), carry, logits, ordered=True)
        return carry + weights

    assert scan_microseconds(step, jnp.float32(1), jnp.arange(3.0), jnp.float32(10), steps=7) > 0
    jax.effects_barrier()
    assert seen[:3] == [(1, 0), (11, 1), (21, 2)]


def test_adapters_of_one_rank_are_kept_until_the_next() -> None:
    weights = Weights(TINY.size, 4)
    assert weights.lora(0, 0) is None
    first = weights.lora(16, 1)
    assert first is not None
    assert weights.lora(16, 1) is first
    mixed = weights.lora(16, 8)
    assert mixed is not None
    assert mixed.gate_up_a is not None
    assert mixed.gate_up_a.shape == (8, 4, 16, 64)
    assert weights.lora(16, 1) is not first


def test_mixed_tokens_have_every_adapter_or_none() -> None:
    ids = random_adapter_ids(Case(4, 512, 16, 8))
    assert ids is not None
    assert set(ids.tolist()) == set(range(-1, 8))
    assert random_adapter_ids(Case(4, 512, 16, 1)) is None


@pytest.mark.parametrize(("peer", "ending"), [(50.0, ", peer 50.0, jmoe packed / peer 2.00"), ("no GPU", "no GPU")])
def test_a_finished_row_is_one_line_with_what_follows_from_it(peer: float | str, ending: str) -> None:
    microseconds = {"jmoe packed": 100.0, "triton_kernels": peer}
    rows: list[Row] = [{"experts": 4, "tokens": 1, "rank": 0, "adapters": 0, "microseconds": microseconds}]
    text = line(rows, Measured(Case(4, 1), microseconds))
    assert text.startswith("4 experts, 1 token: jmoe packed 100.0, triton_kernels ")
    assert text.endswith(ending)
