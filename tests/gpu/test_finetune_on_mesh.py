"""Training on two GPUs by the kernels: one GPU's losses, and LoRA's gradients summed once a step."""

from typing import Any

import jax
import numpy as np
import pytest

from jmoe.bench.model.case import sizes
from jmoe.device_mesh import make_mesh
from jmoe.finetune.batches import Batch
from jmoe.finetune.step import Trainer, make_optimizer
from jmoe.gpt_oss import Layout
from jmoe.gpt_oss.new_adapter import new_adapter
from jmoe.gpt_oss.random_model import random_model
from tests.finetune.mesh_training import all_reduces
from tests.finetune.test_step import CONFIG

pytestmark = pytest.mark.gpu

STEPS = 3


@pytest.fixture(autouse=True)
def _two_gpus() -> None:
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")


def trainer(axes: str, fsdp: bool, remat: Any) -> Trainer:
    base = random_model(sizes()["tiny"], remat=remat)
    base = base.with_adapters(new_adapter(base.config, rank=16, scale=2.0))
    if axes:
        mesh = make_mesh(axes, jax.devices()[:2])
        base = base.on_mesh(mesh, Layout.of(mesh, fsdp=fsdp))
    return Trainer(base, make_optimizer(CONFIG, STEPS), loss_chunk=64)


def batch(step: int) -> Batch:
    tokens = np.random.default_rng(step).integers(0, 500, (2, 4, 128)).astype(np.int32)
    segments = np.broadcast_to(np.arange(128, dtype=np.int32) // 64, tokens.shape)
    return Batch(tokens, np.roll(tokens, -1, axis=-1), np.ones(tokens.shape, np.float32), np.array(segments))


def trained(one: Trainer) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of each step."""
    state, found = one.start, []
    for step in range(STEPS):
        state, outcome = one.step(state, batch(step))
        assert bool(outcome.finite)
        found.append((float(outcome.loss), float(outcome.gradient_norm)))
    return found


@pytest.mark.parametrize("remat", ["layers", "experts", "nothing"])
@pytest.mark.parametrize(("axes", "fsdp"), [("data=2", False), ("data=2", True), ("expert=2", False)])
def test_two_gpus_have_one_gpus_losses_and_sum_gradients_once(axes: str, fsdp: bool, remat: Any) -> None:
    two = trainer(axes, fsdp, remat)
    program = two.compile(two.start, batch(0)).as_text()
    assert program is not None
    assert all_reduces(program)[0] == 0
    got, want = trained(two), trained(trainer("", False, remat))
    # Roundings to bfloat16 in other places; a token whose router's logits nearly tie may take another expert.
    np.testing.assert_allclose(got, want, rtol=5e-2)
    np.testing.assert_allclose(got[0][0], want[0][0], rtol=5e-3)
