"""The model on a mesh of eight CPU devices: what is read, where it lies, and that it computes what one device does."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jmoe import gpt_oss
from jmoe.device_mesh import make_mesh
from jmoe.gpt_oss import Layout
from tests.gpt_oss.mesh_program import CASE, TOKENS, bytes_read, differences, error

ROOT = Path(__file__).parents[2]
LAYOUTS = ["data=8/fsdp", "data=2,expert=4/", "heads=4,data=2/fsdp", "data=2,model=4/"]


def found(*cases: str) -> dict[str, Any]:
    """What tests.gpt_oss.mesh_program says of the cases, in a process of its own: devices are counted once."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.gpt_oss.mesh_program", *cases]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        lines |= json.loads(line)
    return lines


def check_load(got: dict[str, Any], layout: str) -> None:
    assert got["wrong"] == []
    assert got["read"], "a tensor's bytes are read once each, whatever the number of devices that have them"
    assert got["devices"] == [8]
    data, _, rest = layout.partition("/")
    axes = {name: int(size) for name, size in (part.split("=") for part in data.split(","))}
    experts = axes.get("expert", axes.get("model", 1)) * (axes.get("data", 1) if rest.startswith("fsdp") else 1)
    heads = axes.get("heads", axes.get("model", 1))
    share = got["share"]
    assert share[".embedding"] == share[".layers.router.weight"] == share[".layers.o.bias"] == 1
    assert {share[f".layers.{name}"] for name in ("qkv.weight", "qkv.bias", "o.weight", "sinks")} == {1 / heads}
    assert {value for name, value in share.items() if name.startswith(".layers.experts")} == {1 / experts}
    assert share[".lora_b['q']"] == share[".lora_a['o']"] == 1 / heads
    assert share[".lora_a['down']"] == share[".lora_b['gate_up']"] == 1 / axes.get("expert", axes.get("model", 1))


def check_run(got: dict[str, Any]) -> None:
    assert max(got["errors"].values()) <= 2e-6, got["errors"]


def test_two_devices_read_their_parts_and_compute_what_one_does() -> None:
    mesh = make_mesh("model=2", jax.devices("cpu"))
    layout = Layout.of(mesh)
    load = functools.partial(gpt_oss.load, CASE / "model", packed=True, dtype=jnp.float32, progress=False)
    split, read = bytes_read(lambda: load(mesh=mesh, layout=layout))
    alone, whole = bytes_read(load)
    assert read == whole
    assert differences(split, alone.on_mesh(mesh, layout)) == []
    got, want = (jax.jit(lambda model: model(TOKENS % 100))(model) for model in (split, alone))
    assert error(got, want) <= 2e-6
    assert got.sharding.spec == P(None, None, "model")  # whose sequences are the same share the vocabulary


@pytest.mark.slow
def test_a_checkpoint_is_read_part_by_part_and_computes_what_one_device_does() -> None:
    layout = "data=2,expert=2,heads=2/fsdp"
    load, logits = found(f"load/{layout}/packed", f"logits/{layout}/float32").values()
    check_load(load, layout)
    check_run(logits)
    assert logits["spec"] == "P(('data', 'expert'), None, 'heads')"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_those_of_one_device_in_float32(layout: str) -> None:
    (got,) = found(f"run/{layout}/float32").values()
    check_run(got)
    moved = {"all-reduce"} if "model" in layout or "heads" in layout else set()
    moved |= {"all-gather", "reduce-scatter"} if "expert" in layout else set()
    moved |= {"all-gather"} if "fsdp" in layout else set()
    assert set(got["sent"]) == moved


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data=2,expert=2,heads=2/fsdp", "model=4,data=2/"])
def test_devices_gradients_in_a_shard_map_sum_to_one_devices(layout: str) -> None:
    (got,) = found(f"share/{layout}/").values()
    check_run(got)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data=2,expert=4/", "data=2,heads=2,expert=-1/fsdp"])
def test_checkpoints_and_random_models_are_those_of_one_device(layout: str) -> None:
    cases = [f"load/{layout}/packed", f"load/{layout}/plain", f"made/{layout}/"]
    if "expert=-1" in layout:
        cases = [case.replace("expert=-1", "expert=2") for case in cases]
    packed, plain, random = found(*cases).values()
    for one in (packed, plain):
        check_load(one, cases[0].split("/", 1)[1])
    if not layout.endswith("/fsdp"):  # of which doctor --mesh does not know
        assert plain["held"] == plain["told"]
    assert random["wrong"] == []
