"""Device memory while dense experts are rounded to MXFP4: at gpt-oss-20b's widths, a sixth of its layers' experts."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jmoe import gpt_oss
from jmoe.bench.model.loading import layer_specs, random_tensor, write_checkpoint
from jmoe.checkpoint.tensors import Spec

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

LAYERS = 6

LOAD = """
import json, sys, jax
from jmoe import gpt_oss
from jmoe.bench.model.memory import anonymous_gib, in_use_gib, peak_gib
from jmoe.ops.mxfp4 import PackedMxfp4
jax.numpy.zeros(1).block_until_ready()
model = gpt_oss.load(sys.argv[1], quantize="mxfp4", progress=False)
jax.block_until_ready(jax.tree.leaves(model))
assert isinstance(model.stack.experts.down, PackedMxfp4)
packed = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / 2**30
print(json.dumps({"packed": packed, "held": in_use_gib(), "peak": peak_gib(), "host": anonymous_gib()}))
"""


def write_dense(folder: Path) -> None:
    """gpt-oss-20b's widths with dense bfloat16 experts, 10 GB."""
    released = gpt_oss.Config.gpt_oss_20b()
    config = dataclasses.replace(released, num_hidden_layers=LAYERS, layer_types=released.layer_types[:LAYERS])
    none = dataclasses.replace(config, num_hidden_layers=0, layer_types=())
    write_checkpoint(folder, none)  # all but the layers
    entries = json.loads((folder / "config.json").read_text())
    entries |= {"num_hidden_layers": LAYERS, "layer_types": list(config.layer_types)}
    (folder / "config.json").write_text(json.dumps(entries))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    random = np.random.default_rng(0)
    experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
    for layer in range(LAYERS):
        specs = {n: spec for n, spec in layer_specs(config, layer).items() if not n.endswith(("_blocks", "_scales"))}
        tensors = {name: random_tensor(random, name, spec) for name, spec in specs.items()}
        for name, shape in (("gate_up", (experts, hidden, 2 * inner)), ("down", (experts, inner, hidden))):
            # One random expert repeated: making them all would take longer than what is measured.
            one = random_tensor(random, name, Spec("BF16", shape[1:]))
            tensors[f"model.layers.{layer}.mlp.experts.{name}_proj"] = np.broadcast_to(one, shape).copy()
        assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
        file = f"layer-{layer}.safetensors"
        save_file(tensors, folder / file)
        index["weight_map"] |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_device_holds_the_packed_model_and_little_else(tmp_path: Path) -> None:
    """In a process of its own, whose peak is of the load alone."""
    write_dense(tmp_path)
    run = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    memory = json.loads(run.stdout.splitlines()[-1])
    print(memory)
    assert memory["peak"] <= 1.3 * memory["packed"]
    assert memory["host"] <= 4
