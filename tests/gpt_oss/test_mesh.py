"""A model on several devices, each with its own part of the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[1] / "data" / "tiny_case" / "model"

# In a process of its own: the number of devices is fixed when JAX starts.
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jmoe import gpt_oss

mesh = jax.make_mesh((2,), ("batch",), axis_types=(getattr(jax.sharding.AxisType, sys.argv[2]),))
model = gpt_oss.load(sys.argv[1], mesh=mesh, dtype=jnp.float32, packed=True, progress=False)
for leaf in jax.tree.leaves(model):
    assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 2, leaf.sharding
tokens = jnp.arange(4 * 7).reshape(4, 7) % model.config.vocab_size
split = jax.shard_map(lambda model, tokens: model(tokens), mesh=mesh, in_specs=(P(), P("batch")), out_specs=P("batch"))
got = jax.jit(split)(model, jax.device_put(tokens, jax.NamedSharding(mesh, P("batch"))))
assert len(got.sharding.device_set) == 2 and not got.sharding.is_fully_replicated
want = gpt_oss.load(sys.argv[1], dtype=jnp.float32, progress=False)(tokens)
np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-4, atol=1e-4)
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_shard_map_splits_a_batch_over_the_devices_that_the_model_is_on(axes: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(MODEL), axes], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout.strip()) == (0, "same"), done.stderr[-2000:]
