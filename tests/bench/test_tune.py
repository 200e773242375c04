"""Choosing tiles by measurements, which are made up here."""

import dataclasses
import math

import jax.numpy as jnp
import pytest

from jmoe.bench import tune
from jmoe.triton_src.tiles import PACKED_TILES, TILES, TileTables

OWN, OTHER, THIRD = (dataclasses.replace(tile, rows=math.inf) for tile in TILES[90][:3])


def test_the_fastest_tile_that_ran_is_chosen() -> None:
    choice = tune.choose_best("portable", 64, {OWN: 100.0, OTHER: 90.0, THIRD: "OutOfResources: shared memory"})
    assert (choice.tile, choice.microseconds, choice.built_in_microseconds) == (OTHER, 90.0, 100.0)
    assert (choice.tried, choice.failed, choice.rows) == (3, 1, 8.0)
    assert str(choice) == (
        "portable, 64 tokens: Tile(block_m=16, block_n=64, block_k=128, num_warps=2, num_stages=3, shrink_splits=2) "
        "90.0 us, built in 100.0; 3 tried, 1 failed"
    )


def test_what_is_within_noise_changes_nothing() -> None:
    assert tune.choose_best("portable", 64, {OWN: 100.0, OTHER: 98.5}).tile == OWN
    assert tune.choose_best("portable", 64, {OWN: "failed", OTHER: 98.5}).tile == OTHER


def test_that_no_tile_runs_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no packed tile runs with 64 tokens; the first one: a wrong result"):
        tune.choose_best("packed", 64, {OWN: "a wrong result", OTHER: "failed"})


def test_candidates_are_timed_against_the_first_ones_result(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []

    def prepare_tile(table, x, logits, experts, capability, tile):  # type: ignore[no-untyped-def]
        if tile == OTHER:
            raise ValueError("does not compile")

        def timer(result):  # type: ignore[no-untyped-def]
            wanted.append(result)
            if len(wanted) == 1:
                raise ValueError("does not run")
            return float(len(wanted)), jnp.ones(3) * len(wanted)

        return timer

    monkeypatch.setattr(tune, "prepare_tile", prepare_tile)
    choice = tune.best_of("portable", 64, TILES[90][0], TILES[90], experts=None, capability=90)  # type: ignore[arg-type]
    assert wanted[:2] == [None, None]
    assert all((result == 2).all() for result in wanted[2:])
    assert (choice.microseconds, choice.failed) == (2.0, 2)
    assert choice.built_in_microseconds == "ValueError: does not run"


def test_each_number_of_tokens_is_measured_once() -> None:
    assert tune.distinct((256, 1, 64, 1)) == [1, 64, 256]
    assert tune.distinct(tune.TOKENS) == list(tune.TOKENS)


def test_choices_become_tables() -> None:
    packed = dataclasses.replace(PACKED_TILES[90][0], rows=math.inf)
    choices = [
        tune.choose_best("portable", 4, {OWN: 1.0}),
        tune.choose_best("portable", 64, {OTHER: 1.0}),
        tune.choose_best("packed", 4, {packed: 1.0}),
    ]
    portable = (dataclasses.replace(OWN, rows=2.0), OTHER)
    assert tune.tables_of(choices) == TileTables(portable, (packed,))
    assert tune.single("packed", packed) == TileTables((), (packed,))


def test_a_wrong_result_is_seen() -> None:
    wanted = jnp.array([3.0, 4.0], jnp.bfloat16)
    assert tune.relative_difference(wanted, wanted) == 0
    assert tune.relative_difference(jnp.array([3.0, 4.5], jnp.bfloat16), wanted) == pytest.approx(0.1)
    assert not tune.relative_difference(wanted * jnp.nan, wanted) <= tune.TOLERANCE
