"""The example, with few steps."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiled_programs import optimised

EXAMPLE = Path(__file__).parents[2] / "examples/finetune_layer.py"


@pytest.mark.slow
def test_it_trains_lora_and_leaves_the_rest_as_it_is() -> None:
    command = [sys.executable, EXAMPLE, "--pretrain-steps", "10", "--steps", "20"]
    environment = optimised() | {"COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rounded, tuned = (float(number) for number in re.findall(r"(?:MXFP4|on the manual) +│ +([\d.]+)", done.stdout))
    assert tuned < rounded - 0.02
    before, after = re.search(r"the others, (\w+) before, are (\w+)\s+after", done.stdout).groups()
    assert before == after
