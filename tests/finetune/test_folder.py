"""What a run may find in its folder, and what it refuses to overwrite."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.folder import FolderInUseError, run_folder

ADAPTER = {"adapter/adapter_model.safetensors": "factors"}


def options(out: Path, **changes: object) -> FinetuneConfig:
    return dataclasses.replace(FinetuneConfig(model="m", data="d", out=str(out), checkpoint_every=3), **changes)  # type: ignore[arg-type]


def begun(taken: int, **changes: object) -> dict[str, str]:
    """The files of a run that was stopped after so many steps, before a checkpoint."""
    return {
        "finetune.json": json.dumps(dataclasses.asdict(options(Path("out"), **changes))),
        "begun.txt": "2025-08-05\n",
        "metrics.jsonl": "".join(f'{{"step": {step}}}\n' for step in range(taken + 1)),
    }


def fill(out: Path, files: dict[str, str]) -> dict[str, str]:
    for name, text in files.items():
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return contents(out)


def contents(out: Path) -> dict[str, str]:
    return {str(file.relative_to(out)): file.read_text() for file in sorted(out.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": "mine"}, r"holds no run that could go on, but notes\.txt: choose another --out, or remove"),
        (ADAPTER, r"holds no run that could go on, but adapter"),
        ({str(n): "" for n in range(7)}, r"but 0, 1, 2, 3, 4 and 2 more: "),
        ({"checkpoints/epoch_1": ""}, r"but checkpoints: "),
        ({**begun(2), **ADAPTER}, r"holds adapter of a run whose checkpoints are gone"),
        ({**begun(2), "loss.png": "curve"}, r"holds loss\.png of a run whose checkpoints are gone"),
        (begun(4), r"holds metrics\.jsonl of 4 steps of a run whose checkpoints are gone"),
        (begun(1, rank=3, seed=1), r"other options \(rank was 3, is 16, seed was 1, is 0\): choose another"),
        ({"finetune.json": begun(0, rank=3)["finetune.json"]}, r"other options \(rank was 3"),
        ({"finetune.json": "{"}, r"finetune\.json is not JSON"),
        ({"finetune.json": "[]"}, r"finetune\.json holds no options"),
    ],
)
def test_what_a_run_would_overwrite_is_refused_and_left(files: dict[str, str], message: str, tmp_path: Path) -> None:
    before = fill(tmp_path, files)
    with pytest.raises(ValueError, match=message), run_folder(options(tmp_path)):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "files",
    [
        {},
        {".lock": ""},
        {"checkpoints/2.orbax-checkpoint-tmp/state": "half"},
        begun(3),
        begun(2, steps=9, patience=1, keep=7, quiet=True),  # nothing that is computed
        begun(0, rank=3),  # it had not taken a step
        {**begun(2), "checkpoints/2.orbax-checkpoint-tmp/state": "half"},
        {**begun(7), **ADAPTER, "checkpoints/3/state": "whole"},  # its checkpoint is looked at by Checkpoints
    ],
)
def test_a_run_that_can_go_on_or_begin_again_may(files: dict[str, str], tmp_path: Path) -> None:
    fill(tmp_path / "run", files)
    with run_folder(options(tmp_path / "run")) as out:
        assert out == tmp_path / "run"


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(tmp_path / "gone")
    for out in (file, link):
        with pytest.raises(ValueError, match=f"--out must be a folder, but {out} is something else"):  # noqa: SIM117
            with run_folder(options(out)):
                pass
    assert file.read_text() == "mine"


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with run_folder(options(tmp_path / "run")) as out:
        fill(out, begun(2, rank=3))  # what it has written is no other one's concern
        with pytest.raises(FolderInUseError, match=r"another run is going on in .*run: "), run_folder(options(out)):
            pass
    os.remove(out / "finetune.json")
    with pytest.raises(ValueError, match="holds no run"), run_folder(options(out)):
        pass
