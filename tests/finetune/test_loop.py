"""The steps of a run: going on after a stop, early stop, faults."""

import contextlib
import dataclasses
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jmoe.finetune import checkpoint as saving
from jmoe.finetune.batches import Batch
from jmoe.finetune.checkpoint import Checkpoints, Standing
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.display import Display
from jmoe.finetune.loop import NonFiniteLossError, Run, run_steps
from jmoe.finetune.metrics import Metrics, plot, read
from jmoe.finetune.step import Trainer, TrainState, make_optimizer
from jmoe.gpt_oss import load
from jmoe.gpt_oss.new_adapter import new_adapter

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
STEPS = 5
CONFIG = FinetuneConfig(
    model="m", data="d", out="o", learning_rate=1e-2, validate_every=2, checkpoint_every=2, steps=STEPS
)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    base = load(TINY, dtype=jnp.float32, progress=False)
    model = base.with_adapters(new_adapter(base.config, rank=2, scale=2.0, targets=("o", "down")))
    return Trainer(model, make_optimizer(CONFIG, STEPS), loss_chunk=16)


def batch_of(step: int) -> Batch:
    rng = np.random.default_rng(step)
    tokens, targets = rng.integers(0, 512, (2, 1, 1, 8)).astype(np.int32)
    return Batch(tokens, targets, np.ones((1, 1, 8), np.float32), np.ones((1, 1, 8), np.int32))


@contextlib.contextmanager
def a_run(
    trainer: Trainer, out: Path, config: FinetuneConfig = CONFIG, data: str = "rows", **changes: Any
) -> Iterator[tuple]:
    """(the run, its state and standing as restored, and what else run_steps takes)."""
    out.mkdir(exist_ok=True)
    validation = [Batch(*(array[0] for array in batch_of(100)))]
    nothing = lambda *_: None  # noqa: E731
    run = Run(config, trainer, batch_of, validation, STEPS, out, nothing, nothing, nothing, lambda: False)
    with Checkpoints(out / "checkpoints", config, data) as checkpoints:
        state, standing = checkpoints.restore(jax.tree.map(jnp.array, trainer.start))
        display = Display(STEPS, standing.step, Console(quiet=True))
        with Metrics(out, standing.step) as metrics, display:
            yield dataclasses.replace(run, **changes), state, standing, checkpoints, metrics, display


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read(out) if "loss" in row]


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_with_the_same_bits(trainer: Trainer, tmp_path: Path) -> None:
    with a_run(trainer, tmp_path / "whole") as run:
        whole, standing, ending = run_steps(*run)
    assert (standing.step, ending) == (STEPS, "finished")

    def cut_off(step: int) -> Batch:
        if step == 3:
            raise RuntimeError("cut off")
        return batch_of(step)

    with a_run(trainer, tmp_path / "cut", batch=cut_off) as run, pytest.raises(RuntimeError):
        run_steps(*run)
    assert len(losses(tmp_path / "cut")) == 3
    with a_run(trainer, tmp_path / "cut") as run:
        assert run[2].step == 2  # the newest checkpoint
        resumed, standing, _ = run_steps(*run)
    assert standing.step == STEPS
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_run_that_had_finished_goes_on_as_if_it_had_not(trainer: Trainer, tmp_path: Path) -> None:
    # The optimizer's state goes on too: the trainer's schedule is that of all steps from the beginning.
    for name, lengths in (("whole", [STEPS]), ("extended", [2, STEPS])):
        for steps in lengths:
            with a_run(trainer, tmp_path / name, dataclasses.replace(CONFIG, steps=steps), steps=steps) as run:
                _, standing, ending = run_steps(*run)
            assert (standing.step, ending) == (steps, "finished")
    assert losses(tmp_path / "extended") == losses(tmp_path / "whole")


def test_a_run_does_not_go_on_with_other_data(trainer: Trainer, tmp_path: Path) -> None:
    with a_run(trainer, tmp_path) as run:
        run_steps(*run)
    with pytest.raises(ValueError, match="holds a run on other data"), a_run(trainer, tmp_path, data="other rows"):
        pass


def test_a_run_that_shall_stop_finishes_the_step_and_saves(trainer: Trainer, tmp_path: Path) -> None:
    asked: list[int] = []

    def ask(step: int) -> Batch:
        if step == 2:
            asked.append(step)
        return batch_of(step)

    with a_run(trainer, tmp_path, batch=ask, stop=lambda: bool(asked)) as run:
        _, standing, ending = run_steps(*run)
    assert (standing.step, ending) == (3, "interrupted")
    with a_run(trainer, tmp_path) as run:
        assert run[2].step == 3


def test_a_run_that_shall_stop_before_its_first_step_takes_none(trainer: Trainer, tmp_path: Path) -> None:
    with a_run(trainer, tmp_path, stop=lambda: True) as run:
        _, standing, ending = run_steps(*run)
        assert not run[3].holds()
    assert (standing.step, ending, read(tmp_path)) == (0, "interrupted", [])


def test_a_validation_that_was_stopped_is_done_first_when_the_run_goes_on(trainer: Trainer, tmp_path: Path) -> None:
    with a_run(trainer, tmp_path / "whole") as run:
        _, whole, _ = run_steps(*run)
    for stops in (2, STEPS):  # the last step's too
        asked: list[int] = []

        def stop(step: int, outcome: object, asked: list[int] = asked, stops: int = stops) -> None:
            if step == stops - 1:
                asked.append(step)

        with a_run(trainer, tmp_path / "cut", after_step=stop, stop=lambda asked=asked: bool(asked)) as run:
            _, standing, ending = run_steps(*run)
        assert (standing.step, ending) == (stops, "interrupted")
        assert "validation_loss" not in read(tmp_path / "cut")[-1]
    with a_run(trainer, tmp_path / "cut") as run:
        _, standing, ending = run_steps(*run)
    assert ending == "finished"
    assert dataclasses.replace(standing, validation_due=False) == whole
    figures = [
        [{name: row.get(name) for name in ("step", "loss", "validation_loss")} for row in read(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert figures[0] == figures[1]


def test_a_run_without_progress_stops_early(trainer: Trainer, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, patience=2, validate_every=1)
    saved: list[TrainState] = []
    with a_run(trainer, tmp_path, config, save_adapter=saved.append) as (run, state, _, *rest):
        # No loss is below this one.
        _, standing, ending = run_steps(run, state, Standing(best_loss=0.0), *rest)
    assert (standing.step, ending, saved) == (2, "early stop", [])
    with a_run(trainer, tmp_path, config) as run:
        _, standing, ending = run_steps(*run)
    assert (standing.step, ending) == (2, "early stop")  # run again, it takes no step more


def test_a_run_cut_off_before_a_checkpoint_begins_its_metrics_again(trainer: Trainer, tmp_path: Path) -> None:
    def cut_off(step: int) -> Batch:
        if step == 1:
            raise RuntimeError("cut off")
        return batch_of(step)

    with a_run(trainer, tmp_path, batch=cut_off) as run, pytest.raises(RuntimeError):
        run_steps(*run)
    with a_run(trainer, tmp_path) as run:
        run_steps(*run)
    assert [row["step"] for row in read(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_loss_that_is_not_finite_stops_with_its_batch(trainer: Trainer, tmp_path: Path) -> None:
    def faulty(step: int) -> Batch:
        batch = batch_of(step)
        return batch._replace(weights=batch.weights * np.inf) if step == 2 else batch

    with a_run(trainer, tmp_path, batch=faulty) as run, pytest.raises(NonFiniteLossError, match="step 3: loss"):
        run_steps(*run)
    with np.load(tmp_path / "nonfinite_step_3.npz") as saved:
        np.testing.assert_array_equal(saved["tokens"], batch_of(2).tokens)
    with a_run(trainer, tmp_path) as run:
        assert run[2].step == 2
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(run[1].factors))


@pytest.mark.parametrize("step", [0, 2])
def test_a_validation_loss_that_is_not_finite_is_never_the_best(
    step: int, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([float("nan")] if step == 0 else [1.0, float("nan")])
    monkeypatch.setattr(trainer, "loss", lambda *_: next(losses))
    saved: list[TrainState] = []
    with (
        a_run(trainer, tmp_path, save_adapter=saved.append) as run,
        pytest.raises(NonFiniteLossError, match=f"step {step}: validation loss nan"),
    ):
        run_steps(*run)
    assert saved == []


@pytest.mark.parametrize("lost", ["run", "run/metadata", "state"])
def test_a_damaged_checkpoint_is_named(lost: str, trainer: Trainer, tmp_path: Path) -> None:
    with a_run(trainer, tmp_path) as run:
        run_steps(*run)
    part = tmp_path / "checkpoints" / "5" / lost
    shutil.rmtree(part) if part.is_dir() else part.write_text("")
    with pytest.raises(ValueError, match=r"checkpoints/5 cannot be read"), a_run(trainer, tmp_path):
        pass


def test_a_full_disk_is_said_before_writing(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    with a_run(trainer, tmp_path) as run, monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OSError, match=r"no room for a checkpoint of [\d,]+ bytes .*: 10 are free"):
            run_steps(*run)


def test_a_checkpoint_that_cannot_be_written_is_named(
    trainer: Trainer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with a_run(trainer, tmp_path) as (_, state, standing, checkpoints, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))  # files end there, as at a quota
        try:
            with pytest.raises(OSError, match=f"checkpoint 3 could not be written to {checkpoints.directory}: "):
                checkpoints.save(state, dataclasses.replace(standing, step=3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not checkpoints.holds()
    assert "Traceback" not in capfd.readouterr().err


def test_an_adapter_is_never_without_a_checkpoint(trainer: Trainer, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, validate_every=1, checkpoint_every=100)

    def cut_off(step: int) -> Batch:
        if step == 2:
            raise RuntimeError("cut off")
        return batch_of(step)

    with a_run(trainer, tmp_path, config, batch=cut_off) as run, pytest.raises(RuntimeError):
        run_steps(*run)
    with a_run(trainer, tmp_path, config) as run:
        assert run[2].step == 1


def test_another_configuration_does_not_go_on(trainer: Trainer, tmp_path: Path) -> None:
    with a_run(trainer, tmp_path) as run:
        run_steps(*run)
    other = dataclasses.replace(CONFIG, rank=3, keep=5)
    with pytest.raises(ValueError, match=r"other options \(rank was 16, is 3\)"), a_run(trainer, tmp_path, other):
        pass


def test_figures_and_their_curve(trainer: Trainer, tmp_path: Path) -> None:
    with a_run(trainer, tmp_path) as run:
        run_steps(*run)
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 2, 4, 5]
    assert {"loss", "gradient_norm", "learning_rate", "tokens", "tokens_per_second"} <= set(rows[1])
    assert plot(tmp_path).read_bytes().startswith(b"\x89PNG")
