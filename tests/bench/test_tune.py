"""Choosing launch parameters by measurements, which are made up here."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from jmoe.bench import tune
from jmoe.bench.tuned_work import Sizes, Works
from jmoe.cli import app
from jmoe.ops.launch.local_gpu import Trial
from jmoe.triton_src.tile_tables import KINDS, own_table, read_user_table
from jmoe.triton_src.tiles import LaunchTable, bound_of, layer_tile, unbounded

TABLE = own_table(90)
OWN, OTHER, THIRD = ((unbounded(tile),) for tile in TABLE.grouped_matmul[:3])
STEP = tune.STEPS[0]
DECODE = {step.section for step in tune.STEPS if step.part == "decode"}
SMALL = Sizes(experts=4, hidden=64, intermediate=32, top_k=2, rank=4, heads=4, key_heads=2, head_dim=32, context=64)


def test_the_fastest_that_ran_is_chosen() -> None:
    choice = tune.choose_best(STEP, 64, 8.0, {OWN: 100.0, OTHER: 90.0, THIRD: "OutOfResources: shared memory"})
    assert (choice.tiles, choice.microseconds, choice.microseconds_before) == (OTHER, 90.0, 100.0)
    assert (choice.tried, choice.failed) == (3, 1)
    assert str(choice) == (
        "grouped_matmul by forward, 64 tokens: GroupedMatmulTile(rows=inf, block_m=16, block_n=64, block_k=128, "
        "num_warps=2, num_stages=3, shrink_splits=2); 90.0 us, before 100.0; 3 tried, 1 failed"
    )


def test_what_is_within_noise_changes_nothing() -> None:
    choice = tune.choose_best(STEP, 64, 8.0, {OWN: 100.0, OTHER: 98.5})
    assert choice.tiles == OWN
    assert ": as before; 100.0 us" in str(choice)
    assert tune.choose_best(STEP, 64, 8.0, {OWN: "failed", OTHER: 98.5}).tiles == OTHER


def test_that_no_tile_runs_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no grouped_matmul tile runs forward of 64 tokens; the first one: a wrong"):
        tune.choose_best(STEP, 64, 8.0, {OWN: "a wrong result", OTHER: "failed"})


def test_candidates_are_run_once_a_program_against_the_first_ones_result() -> None:
    wanted: list[Any] = []

    def prepare(name: str) -> tune.Timer:
        if name == "broken":
            raise ValueError("does not compile")

        def run(results: Any) -> tuple[float, Any]:
            wanted.append(results)
            if name == "first":
                raise ValueError("does not run")
            return float(len(wanted)), name

        return tune.Timer(name.removesuffix(" again"), run)

    names = ["first", "broken", "second", "third", "third again"]
    tried = [(name,) for name in names]
    choice = tune.best_of(STEP, 64, 8.0, tried, names, prepare)  # type: ignore[arg-type]
    assert wanted == [None, None, "second"]
    assert choice is not None
    assert (choice.tiles, choice.microseconds, choice.tried, choice.failed) == (("second",), 2.0, 4, 2)
    assert choice.microseconds_before == "ValueError: does not run"
    assert tune.best_of(STEP, 64, 8.0, tried[3:], names[3:], prepare) is None  # type: ignore[arg-type]


class StandIn:
    """Times of tables without a GPU: `times` gives those of a work's name; every table is another program."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int, bool]] = []
        monkeypatch.setattr(Works, "of", self.work)

    def work(self, name: str, tokens: int, *, packed: bool) -> Any:
        self.seen.append((name, tokens, packed))
        self.seen.append((name, tokens, packed))
        return name, tokens, packed

    def prepare(self, work: Any, table: LaunchTable) -> tune.Timer:
        _, tokens, packed = work
        time = 100.0
        if packed:
            rows = tune.rows_of("packed_decode", tokens, Sizes())
            kind = type(layer_tile(table, rows, packed=True)).__name__
            # The decode kernel is the faster up to eight rows an expert.
            time += 50 * ((kind == "DecodeTile") == (rows > 8))
        time -= 10 * (table.combine[0].block_h == 1024) + 5 * (table.count_pairs[0].num_warps == 16)
        return tune.Timer(repr(table), lambda _: (time, None))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of a GPU that seems to be here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("jmoe.ops.launch.local_gpu.local_gpu", lambda: (90, "NVIDIA H200"))
    return "NVIDIA H200"


def test_every_section_is_tuned_by_some_part() -> None:
    assert {step.section for step in tune.STEPS} == set(KINDS)
    assert {step.part for step in tune.STEPS} == set(tune.PARTS)


@pytest.mark.parametrize("part", tune.PARTS)
def test_a_part_tunes_its_sections_at_every_number_of_tokens(part: str, stand_in: StandIn) -> None:
    choices = list(tune.tune((4, 256), Sizes(), (part,), TABLE, stand_in.prepare))
    steps = [step.section for step in tune.STEPS if step.part == part]
    few = [choice.section for choice in choices if choice.tokens == 4]
    many = [choice.section for choice in choices if choice.tokens == 256]
    assert few == steps
    # Of 256 tokens, 32 rows an expert, the decode kernel is still tried; decode operations are for few rows.
    assert many == ([] if part == "decode" else steps)


def test_what_is_best_is_used_where_it_was_measured(stand_in: StandIn) -> None:
    choices = list(tune.tune((1, 16, 64, 256, 4096), Sizes(), tune.PARTS, TABLE, stand_in.prepare))
    sections = tune.sections_of(choices, TABLE)
    table = TABLE.over(sections)
    assert table.combine == (dataclasses.replace(TABLE.combine[0], block_h=1024),)
    assert table.count_pairs[0].num_warps == 16
    assert table.decode_linear[-1].rows == math.inf
    kinds = [type(layer_tile(table, rows, packed=True)).__name__ for rows in (0.125, 2, 8, 32, 512)]
    assert kinds == ["DecodeTile"] * 3 + ["GroupedTile"] * 2
    assert bound_of(table.packed_decode[-1]) == 16  # the geometric mean of 8 and 32
    # Far beyond what the decode kernel is for it is not even tried.
    assert not any(choice.section == "packed_decode" and choice.tokens == 4096 for choice in choices)


def test_without_packed_kernels_their_sections_are_left_out(stand_in: StandIn) -> None:
    choices = list(tune.tune((16,), Sizes(), tune.PARTS, own_table(80), stand_in.prepare))
    assert not any("packed" in choice.section for choice in choices)
    assert {packed for name, _, packed in stand_in.seen if name in ("forward", "lora", "gradient")} == {False}


def test_few_measured_rows_do_not_take_the_decode_kernel_further(stand_in: StandIn) -> None:
    choices = list(tune.tune((1, 4), Sizes(), ("lora",), TABLE, stand_in.prepare))
    sections = tune.sections_of(choices, TABLE)
    assert bound_of(sections["packed_decode"][-1]) == bound_of(TABLE.packed_decode[-1])


def test_the_command_writes_a_table_that_is_then_used(
    gpu: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "prepare_on_gpu", lambda _, work, table: stand_in.prepare(work, table))
    run = CliRunner().invoke(app, ["tune", "--tokens", "16", "--parts", "forward"])
    assert run.exit_code == 0, run.output
    first = read_user_table(gpu)
    assert first is not None
    assert first["combine"][0].block_h == 1024
    assert "dgrad" not in first
    # What another run does not measure stays.
    run = CliRunner().invoke(app, ["tune", "--tokens", "16", "--parts", "gradient"])
    assert run.exit_code == 0, run.output
    second = read_user_table(gpu)
    assert second is not None
    assert second["combine"] == first["combine"]
    assert second["count_pairs"][0].num_warps == 16


def test_a_table_of_an_older_jmoe_is_replaced(gpu: str, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "prepare_on_gpu", lambda _, work, table: stand_in.prepare(work, table))
    file = Path(os.environ["XDG_CACHE_HOME"]) / "jmoe/tiles/nvidia_h200.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"portable": [], "packed": []}))
    run = CliRunner().invoke(app, ["tune", "--tokens", "1", "--parts", "decode"])
    assert run.exit_code == 0, run.output
    assert "run `jmoe tune` again: it will be replaced" in run.output
    assert set(read_user_table(gpu) or {}) == DECODE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "forward,all"], "--parts takes forward, lora, gradient, decode, prefill,"),
        (["--hidden", "100"], "hidden must be a multiple of 32, MXFP4's block, got 100"),
        (["--top-k", "5", "--experts", "4"], "top_k must be at most the 4 experts, got 5"),
    ],
)
def test_invalid_options_are_named(options: list[str], message: str) -> None:
    run = CliRunner().invoke(app, ["tune", *options])
    assert run.exit_code != 0
    assert message in " ".join(f"{run.output} {run.exception}".split())


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        *((name, packed) for name in ("forward", "lora", "gradient") for packed in (False, True)),
        *((name, False) for name in (*sorted(DECODE), "paged_prefill_attention", "lora_by_row")),
    ],
)
def test_work_is_traced_as_a_loop_for_a_table(name: str, packed: bool) -> None:
    target = Trial("sm_90", table=TABLE)

    def once() -> tuple[Any, Any]:
        work = Works(SMALL).of(name, 2, packed=packed)
        return work.start, work.carry(work.start, work.call(target, work.start, work.draws[0], work.arrays))

    before, after = jax.eval_shape(once)
    assert after == before


def test_a_wrong_result_is_seen() -> None:
    wanted = {"y": jnp.array([3.0, 4.0], jnp.bfloat16), "dx": jnp.array([1.0])}
    assert tune.relative_difference(wanted, wanted) == 0
    other = wanted | {"y": jnp.array([3.0, 4.5], jnp.bfloat16)}
    assert tune.relative_difference(other, wanted) == pytest.approx(0.1)
    assert not tune.relative_difference(wanted | {"dx": jnp.array([jnp.nan])}, wanted) <= tune.TOLERANCE
