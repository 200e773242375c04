"""What fine-tuning is expected to take beside what it took."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from jmoe.bench.model.case import sizes
from jmoe.checkpoint import Checkpoint
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.memory import (
    GIB,
    MemoryEstimate,
    Shares,
    estimate,
    experts_in_mxfp4,
    new_adapter_shapes,
    warning,
    weight_bytes,
)
from jmoe.gpt_oss.layout import Layout
from jmoe.gpt_oss.random_model import random_model
from tests.checkpoints import TINY, dense, renamed, tensors_of, written


def estimated(size: str, **options: object) -> MemoryEstimate:
    config = FinetuneConfig.create({"model": "m", "data": "d", "out": "o", **options})
    return estimate(config, sizes()[size], new_adapter_shapes(config, sizes()[size]))


@pytest.mark.parametrize(
    ("size", "options", "gib"),
    [
        # The most that was in use, on an H100 and an H200 (README, docs/model.md).
        ("20b", {}, 17.6),
        ("20b", {"remat": "nothing"}, 33),
        ("120b", {"length": 2048, "rank": 8}, 70.1),
        # What XLA's compiled steps hold, on an H200: arguments and temporary buffers.
        ("20b", {"remat": "nothing", "batch_size": 4}, 14.88 + 62.47),
        ("20b", {"remat": "experts"}, 14.88 + 13.46),
        ("20b", {"remat": "experts", "batch_size": 4}, 14.88 + 45.96),
        ("20b", {"batch_size": 4}, 14.88 + 7.47),
        ("20b", {"accumulate": 4}, 14.88 + 3.70),
        ("20b", {"loss_chunk": 4096}, 14.88 + 5.18),
        ("20b", {"length": 512, "remat": "nothing"}, 14.88 + 4.50),
        ("20b", {"length": 8192}, 14.88 + 4.13),
        ("20b", {"rank": 64, "remat": "nothing"}, 21.08 + 21.76),
        ("20b", {"rank": 64}, 21.08 + 4.69),
        ("20b", {"rank": 4, "length": 512}, 13.33 + 0.65),
        ("20b", {"targets": "q,v"}, 12.86 + 1.35),
        ("20b", {"dtype": "float32"}, 14.88 + 4.20),
        ("120b", {"length": 2048, "rank": 8, "remat": "nothing"}, 66.77 + 16.85),
    ],
)
def test_the_estimate_is_near_what_was_measured(size: str, options: dict[str, object], gib: float) -> None:
    assert estimated(size, **options).total / GIB == pytest.approx(gib, rel=0.05)


def test_weights_are_counted_exactly() -> None:
    tiny = dataclasses.replace(sizes()["tiny"], hidden_size=96, num_attention_heads=6)
    model = random_model(tiny, packed=False)
    held = (model.embedding, model.layers, model.norm, model.head)
    leaves = jax.tree.leaves(held)
    assert weight_bytes(tiny, mxfp4=True) == sum(leaf.nbytes for leaf in leaves)


def test_dense_experts_take_two_bytes_a_weight() -> None:
    config = sizes()["20b"]
    more = weight_bytes(config, mxfp4=False) - weight_bytes(config, mxfp4=True)
    weights = 24 * 32 * 3 * 2880 * 2880
    assert more == weights * (2 - 17 / 32)


def test_devices_of_a_mesh_share_experts_and_batches() -> None:
    mesh = AbstractMesh((2, 4), ("data", "expert"))
    config, options = sizes()["120b"], FinetuneConfig(model="m", data="d", out="o", batch_size=8)
    shapes = new_adapter_shapes(options, config)
    shares = [Shares.of(Layout.of(mesh, config, fsdp=fsdp), mesh) for fsdp in (False, True)]
    assert shares == [Shares(8, 4, 4), Shares(8, 8, 4)]
    one = estimate(dataclasses.replace(options, batch_size=1), config, shapes).parts
    own, fsdp = (estimate(options, config, shapes, shares=share).parts for share in shares)
    experts = 36 * 128 * (3 * 2880 * 2880 * 17 // 32 + 2 * 3 * 2880)
    assert one["weights"] - own["weights"] == experts * 3 // 4
    assert own["weights"] - fsdp["weights"] == experts // 8 - 2 * 32 * (3 * 2880 * 2880 * 17 // 32)
    assert own["kept for the backward pass"] == one["kept for the backward pass"]
    assert 0.25 < own["LoRA and AdamW"] / one["LoRA and AdamW"] < 0.27


@pytest.mark.parametrize("router", ["mlp.router.", "mlp.router.linear."])
def test_the_headers_tell_whether_experts_are_in_four_bits(router: str, tmp_path: Path) -> None:
    tensors = renamed(tensors_of(TINY), lambda name: name.replace("mlp.router.", router))
    assert experts_in_mxfp4(Checkpoint(written(tmp_path / "packed", tensors)), None)
    dense_experts = Checkpoint(written(tmp_path / "dense", dense(tensors)))
    assert not experts_in_mxfp4(dense_experts, None)
    assert experts_in_mxfp4(dense_experts, "mxfp4")


def test_the_adapter_is_known_by_its_shapes_alone() -> None:
    config = FinetuneConfig(model="m", data="d", out="o", ranks="q=2", targets="q,down")
    shapes = new_adapter_shapes(config, sizes()["120b"])
    assert isinstance(shapes.a["down"], jax.ShapeDtypeStruct)
    assert shapes.a["q"].shape == (36, 1, 2, 2880)
    assert math.prod(shapes.b["down"].shape) == 36 * 128 * 2880 * 16
    assert shapes.b["down"].dtype == jnp.float32


@pytest.mark.parametrize(("limit", "warned"), [(None, False), (17 * GIB, True), (18 * GIB, False)])
def test_a_step_that_does_not_fit_is_warned_of(limit: int | None, warned: bool) -> None:
    said = warning(estimated("20b").total, limit)
    assert (said is not None) == warned
    if said is not None:
        assert "17.5 of 17.0 GiB" in said
