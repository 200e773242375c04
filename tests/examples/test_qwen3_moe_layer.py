"""The example, with few steps."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/qwen3_moe_layer.py"


@pytest.mark.slow
def test_lora_on_a_checkpoints_block_learns() -> None:
    done = subprocess.run([sys.executable, EXAMPLE, "--steps", "40"], capture_output=True, text=True, check=True)
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", done.stdout).groups())
    assert after < before - 0.5
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[1].rsplit("_", 1)[1] for line in lines if line[:1] == ["trainable"]} == {"a", "b"}
