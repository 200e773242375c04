"""`jmoe finetune` from JSONL to an adapter that PEFT loads."""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.finetune.batches import split
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.metrics import read
from jmoe.finetune.run import day_begun, finetune
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
    with pytest.raises(ValueError, match=r"begun\.txt is no date"):
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
