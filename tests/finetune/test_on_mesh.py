"""Training on meshes of CPU devices: the losses of one device, and gradients summed once a step."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jmoe.finetune.batches import Batch
from tests.finetune.mesh_training import all_reduces, trainer_on
from tests.finetune.test_step import copy, random_batch

ROOT = Path(__file__).parents[2]
ONE = ""
CASES = {
    "data=2": {},
    "data=8": {},
    "expert=2": {"remat": "layers"},
    "data=2,expert=4": {},
    "data=4": {"fsdp": True},
    "data=2,expert=2": {"fsdp": True, "remat": "layers"},
    "data=2,heads=2": {},
    "data=4,model=2": {"fsdp": True, "remat": "experts"},
}
ROUNDING = 2e-6
"""Of a loss in float32 after 20 steps, relative; one float32 rounding is 6e-8."""


@pytest.mark.slow
def test_a_step_on_two_devices_is_that_of_one_and_sums_gradients_once() -> None:
    one, two = trainer_on({}), trainer_on({"data": 2})
    batch = random_batch(1)
    twice = Batch(*(np.concatenate([array, array]) for array in batch))  # whose mean loss is the same
    states = [copy(one.start), two.start]
    program = two.compile(two.start, twice).as_text()
    for _ in range(3):
        states[0], wanted = one.step(states[0], batch)
        states[1], found = two.step(states[1], twice)
        assert float(found.loss) == pytest.approx(float(wanted.loss), rel=ROUNDING)
        assert float(found.gradient_norm) == pytest.approx(float(wanted.gradient_norm), rel=1e-5)
    assert float(found.tokens) == 2 * float(wanted.tokens)
    for name, seen in wanted.expert_gradients.items():
        assert np.array_equal(seen, found.expert_gradients[name])
    within_loops, once = all_reduces(program)
    assert within_loops == 0
    assert once >= 1


def test_a_batch_that_the_devices_cannot_share_is_refused() -> None:
    two = trainer_on({"data": 2})
    with pytest.raises(ValueError, match="must be a multiple of 2, those along mesh data, got 3"):
        two.step(two.start, random_batch(2, rows=3))


@functools.cache
def trained() -> dict[str, Any]:
    """What mesh_training.py finds on eight devices."""
    cases = [ONE, *(f"{sizes}:{json.dumps(options)}" for sizes, options in CASES.items())]
    command = [sys.executable, "-m", "tests.finetune.mesh_training", *cases]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", CASES)
def test_every_layout_has_the_losses_of_one_device_and_sums_gradients_once(sizes: str) -> None:
    found = trained()
    case = found[f"{sizes}:{json.dumps(CASES[sizes])}"]
    np.testing.assert_allclose(case["losses"], found[ONE]["losses"], rtol=ROUNDING)
    within_loops, once = case["all_reduces"]
    assert once >= 1
    # Where devices have the same tokens, what each makes of them is summed in every layer.
    assert (within_loops == 0) == ("heads" not in sizes and "model" not in sizes)
