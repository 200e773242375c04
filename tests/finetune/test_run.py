"""`jmoe finetune` from JSONL to an adapter that PEFT loads."""

import contextlib
import datetime
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jmoe.finetune.batches import split
from jmoe.finetune.checkpoint import Standing
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.folder import FolderInUseError, checkpoint_steps
from jmoe.finetune.metrics import read
from jmoe.finetune.run import day_begun, finetune, go_on
from jmoe.finetune.step import learning_rate
from jmoe.gpt_oss import load

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny_gpt_oss"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    questions = [
        [{"role": "user", "content": f"Is {n} even?"}, {"role": "assistant", "content": "no" if n % 2 else "yes"}]
        for n in range(40)
    ]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in questions))
    return file


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The runs below are of one size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def command(data: Path, out: Path, *more: str) -> list[str]:
    options = {
        "model": TINY,
        "data": data,
        "out": out,
        "length": 64,
        "rank": 2,
        "alpha": 4,
        "steps": 6,
        "learning-rate": 0.01,
        "validate-every": 3,
        "checkpoint-every": 2,
        "dtype": "float32",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "jmoe.cli", "finetune", *flags, *more]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(the directory of a run that went through, what it printed)."""
    out = tmp_path_factory.mktemp("finished")
    run = subprocess.run(command(data, out), capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return out, run.stderr


def test_a_run_keeps_the_day_on_which_it_began(tmp_path: Path) -> None:
    (tmp_path / "begun.txt").write_text("2025-08-05\n")
    assert abs((datetime.date.today() - day_begun(tmp_path)).days) <= 1
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    assert day_begun(tmp_path) == datetime.date(2025, 8, 5)
    (tmp_path / "begun.txt").write_text("yesterday")
    with pytest.raises(ValueError, match=r"begun\.txt is not a date"):
        day_begun(tmp_path)


def test_the_loss_falls_and_what_happens_is_said(finished: tuple[Path, str]) -> None:
    out, printed = finished
    rows = read(out)
    assert rows[-1]["loss"] < rows[1]["loss"]
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    assert "40 rows" in printed
    assert "in the first step" in printed
    assert f"adapter in {out / 'adapter'}" in printed
    assert datetime.date.fromisoformat((out / "begun.txt").read_text().strip()) <= datetime.date.today()
    assert (out / "loss.png").exists()
    assert "validation" in next(line for line in printed.splitlines() if line.startswith("step 3 of 6"))
    assert "validation" not in next(line for line in printed.splitlines() if line.startswith("step 4 of 6"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers
def test_peft_loads_the_adapter_and_computes_the_same(finished: tuple[Path, str]) -> None:
    import torch
    from peft import PeftModel
    from transformers import GptOssForCausalLM, Mxfp4Config

    base = GptOssForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager", quantization_config=Mxfp4Config(dequantize=True)
    )
    adapted = PeftModel.from_pretrained(base, finished[0] / "adapter").eval()
    tokens = np.arange(2, 22, dtype=np.int32).reshape(2, 10)
    with torch.no_grad():
        wanted = adapted(torch.from_numpy(tokens).long()).logits.numpy()
    ours = load(TINY, adapter=finished[0] / "adapter", dtype=jnp.float32, progress=False)(jnp.asarray(tokens))
    assert np.linalg.norm(ours - wanted) <= 1e-3 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_killed_and_run_again_it_has_the_same_losses(data: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    with subprocess.Popen(command(data, tmp_path), stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 300
        checkpoint = tmp_path / "checkpoints" / "2"
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    again = subprocess.run(command(data, tmp_path), capture_output=True, text=True, check=False, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert "going on after step" in again.stderr
    kept = [
        [{name: row.get(name) for name in ("step", "loss", "gradient_norm", "validation_loss")} for row in read(out)]
        for out in (finished[0], tmp_path)
    ]
    assert kept[0] == kept[1]


@contextlib.contextmanager
def running(arguments: list[str], until: Callable[[], bool]) -> Iterator[subprocess.Popen[str]]:
    """A process, from when `until` is true on; ended at the end of the `with`."""
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        deadline = time.monotonic() + 300
        while not until() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_meanwhile_the_folder_is_locked(
    number: signal.Signals, status: int, data: Path, tmp_path: Path
) -> None:
    more = ("--steps", "4000", "--checkpoint-every", "1000", "--quiet")
    with running(command(data, tmp_path, *more), lambda: len(read(tmp_path)) > 2) as process:
        with pytest.raises(FolderInUseError, match="another run is going on in"):
            finetune(FinetuneConfig(model=str(TINY), data=str(data), out=str(tmp_path)))
        process.send_signal(number)
        printed = process.communicate(timeout=120)[1]
    assert process.returncode == status
    step = read(tmp_path)[-1]["step"]
    assert checkpoint_steps(tmp_path)[-1] == step
    saved = f"after {step} steps; adapter in {tmp_path / 'adapter'}"
    assert printed == f"interrupted by {number.name} {saved}; the same command goes on\n"


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    data = tmp_path / "rows"
    os.mkfifo(data)  # whose rows are waited for
    out = tmp_path / "out"
    with running(command(data, out), lambda: (out / ".lock").exists()) as process:
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert printed.splitlines()[-1] == "jmoe: interrupted"
    assert "Traceback" not in printed
    assert [file.name for file in out.iterdir()] == [".lock"]


def read_config(run: Path, **changes: Any) -> FinetuneConfig:
    """The options of the run in a folder, and changes."""
    return FinetuneConfig.create({**json.loads((run / "finetune.json").read_text()), **changes})


@pytest.mark.slow
def test_a_finished_run_can_be_extended(finished: tuple[Path, str], tmp_path: Path) -> None:
    out = shutil.copytree(finished[0], tmp_path / "run")
    printed = io.StringIO()
    result = finetune(read_config(out, out=str(out), steps=7, keep=1, quiet=False), Console(file=printed, width=200))
    assert (result.ending, result.steps) == ("finished", 7)
    assert "the run was to take 6 steps and now takes 7: from here on the learning rate is that" in printed.getvalue()
    rows = read(out)
    assert rows[:-1] == read(finished[0])
    assert rows[-1]["learning_rate"] == pytest.approx(float(learning_rate(read_config(out), 7)(6)))
    assert read_config(out).steps == 7
    with pytest.raises(ValueError, match=r"holds a run that has taken 7 steps, and this one is to take 6: ask for"):
        finetune(read_config(out, steps=6))
    with pytest.raises(ValueError, match=r"holds a run with other options \(rank was 2, is 3\)"):
        finetune(read_config(out, steps=8, rank=3))
    assert read_config(out).steps == 7


def test_a_run_whose_checkpoints_are_gone_is_left_as_it_is(finished: tuple[Path, str], tmp_path: Path) -> None:
    out = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"holds adapter and loss\.png of a run whose checkpoints are gone"):
        finetune(read_config(out, out=str(out)))
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_a_run_stopped_before_its_first_checkpoint_begins_again(finished: tuple[Path, str], tmp_path: Path) -> None:
    out = shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("[0-9]*", "adapter", "*.png"))
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:2]))
    printed = io.StringIO()
    finetune(read_config(out, out=str(out), quiet=True), Console(file=printed, width=200))
    assert printed.getvalue() == f"finished after 6 steps; adapter in {out / 'adapter'}\n"
    assert [row["step"] for row in read(out)] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("standing", "patience", "validate_every", "expected"),
    [
        (Standing(step=4, steps=9), 0, 3, Standing(step=4, steps=6)),
        (Standing(step=4, since_best=2, steps=9), 2, 3, Standing(step=4, steps=6)),  # stopped early, and extended
        (Standing(step=4, since_best=2, steps=6), 2, 3, Standing(step=4, since_best=2, steps=6)),
        (Standing(step=6, steps=9), 0, 4, Standing(step=6, steps=6, validation_due=True)),
        (Standing(step=6, steps=9), 0, 3, Standing(step=6, steps=6)),
    ],
)
def test_where_a_run_of_6_steps_goes_on(
    standing: Standing, patience: int, validate_every: int, expected: Standing
) -> None:
    config = FinetuneConfig(model="m", data="d", out="o", patience=patience, validate_every=validate_every)
    found, notes = go_on(standing, 6, config)
    assert found == expected
    assert len(notes) == (2 if standing.steps != 6 else 1)


@pytest.mark.parametrize("part", [0, 1], ids=["training", "validation"])
def test_a_run_does_not_go_on_with_rows_that_have_changed(part: int, data: Path, finished: tuple[Path, str]) -> None:
    options = json.loads((finished[0] / "finetune.json").read_text())
    config = FinetuneConfig.create(options)
    rows = data.read_text()
    number = split(range(40), config.validation_fraction, config.seed)[part][0]
    data.write_text(rows.replace(f"Is {number} even?", f"Is {number} odd?"))
    try:
        with pytest.raises(ValueError, match="holds a run on other data"):
            finetune(config)
    finally:
        data.write_text(rows)


@pytest.mark.slow
def test_an_adapter_that_is_gone_is_written_again(data: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    out = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(out / "adapter")
    run = subprocess.run(command(data, out), capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "the best adapter is gone from" in run.stderr
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_tokens_that_the_model_lacks_are_an_error(tmp_path: Path) -> None:
    model = shutil.copytree(TINY, tmp_path / "model")
    content = json.loads((model / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 512, "content": "<|more|>"})
    (model / "tokenizer.json").write_text(json.dumps(content))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some <|more|> text"}\n' * 4)
    config = FinetuneConfig(model=str(model), data=str(rows), out=str(tmp_path / "out"), length=64)
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 512\), got 512: the model lacks"):
        finetune(config)


def test_without_matplotlib_nothing_begins(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "jmoe\[finetune\]"'):
        finetune(FinetuneConfig(model=str(TINY), data=str(data), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_wrong_input_is_one_line(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"words": 3}\n')
    run = subprocess.run(command(bad, tmp_path / "out"), capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 1
    assert "bad.jsonl" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
