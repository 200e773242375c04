"""A model that two processes have together: each reads what its devices hold, and they compute what one device does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jmoe import gpt_oss
from jmoe.device_mesh import make_mesh
from jmoe.gpt_oss import Layout
from tests.gpt_oss.mesh_program import CASE, bytes_read, error

mesh = make_mesh("expert=4")
options = {"packed": True, "progress": False, "dtype": jnp.float32, "adapter": CASE / "adapter"}
load = lambda: gpt_oss.load(CASE / "model", mesh=mesh, layout=Layout.of(mesh), **options)
model, read = bytes_read(load)
alone, whole = bytes_read(lambda: gpt_oss.load(CASE / "model", **options))
tokens = np.random.default_rng(0).integers(0, 100, (8, 12)).astype(np.int32)
want = np.asarray(jax.jit(lambda model: model(tokens))(alone))
logits = jax.jit(lambda model: model(tokens), out_shardings=NamedSharding(mesh, P()))(model)
of_experts = lambda counts: sum(size for name, size in counts.items() if ".experts." in name)
rest = lambda counts: {name: size for name, size in counts.items() if ".experts." not in name}
print(json.dumps({
    "experts": of_experts(read) / of_experts(whole),
    "rest": rest(read) == rest(whole),
    "error": error(logits.addressable_shards[0].data, want),
}))
"""


@pytest.mark.slow
def test_each_process_reads_its_own_experts() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, address, number], env=environment, cwd=ROOT, **pipes)
        for number in "01"
    ]
    try:
        for process in processes:
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
            found = json.loads(out.splitlines()[-1])
            assert (found["experts"], found["rest"]) == (0.5, True)
            assert found["error"] <= 2e-6
    finally:
        for process in processes:
            process.kill()
