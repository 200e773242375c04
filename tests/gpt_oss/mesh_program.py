"""What the model does on a mesh of eight CPU devices, in a process of its own: a line of JSON for each case.

    python -m tests.gpt_oss.mesh_program CASE ...    a case is what/mesh/fsdp or not/dtype

load: what is read of the tiny checkpoint, and how its arrays differ from those of the model on one device.
made: the same of a random model, whose numbers are those of one device.
logits: the largest error of logits beside one device's.
share: that of LoRA's gradients that devices return of their own tokens in a jax.shard_map, summed as docs/mesh.md says.
run: of logits, of a prompt's last and of a step after it, and of LoRA's gradients; and what the layers send.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jmoe import gpt_oss
from jmoe.bench.model.case import sizes
from jmoe.checkpoint import Checkpoint
from jmoe.device_mesh import make_mesh
from jmoe.doctor.machine import Machine
from jmoe.doctor.model import examine_model
from jmoe.gpt_oss import GptOss, Layout
from jmoe.gpt_oss.decode import decode, prefill
from jmoe.gpt_oss.log_probs import log_probs
from jmoe.gpt_oss.lora_dropout import LoraDropout
from jmoe.gpt_oss.random_model import random_model
from jmoe.ops.mesh_axes import names_of
from tests.ops.mesh_program import sent

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
SIZES = dataclasses.replace(sizes()["tiny"], num_attention_heads=8, num_key_value_heads=4, num_local_experts=8)
TOKENS = np.random.default_rng(0).integers(0, 500, (8, 16)).astype(np.int32)
LENGTHS = np.array([16, 3, 5, 16, 9, 1, 2, 16], np.int32)
IDS = np.array([0, -1, 1, 0, 1, 1, 0, -1], np.int32)


def differences(got: GptOss, want: GptOss) -> list[str]:
    """The arrays that have other bits, or lie elsewhere."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    wrong = []
    for (path, one), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        same = all(
            mine.index == theirs.index and np.array_equal(np.asarray(mine.data), np.asarray(theirs.data))
            for mine, theirs in zip(one.addressable_shards, other.addressable_shards, strict=True)
        )
        if not same or one.sharding != other.sharding:
            wrong.append(jax.tree_util.keystr(path))
    return wrong


def bytes_read(load: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """(what load gives, how many bytes it read of each tensor)."""
    read: Counter[str] = Counter()
    plain = Checkpoint.slices

    def counted(self: Checkpoint, name: str, *index: slice) -> np.ndarray:
        found = plain(self, name, *index)
        read[name] += found.nbytes
        return found

    Checkpoint.slices = counted  # type: ignore[method-assign]
    try:
        return load(), dict(read)
    finally:
        Checkpoint.slices = plain  # type: ignore[method-assign]


def loaded(mesh: jax.sharding.Mesh, layout: Layout, packed: bool) -> dict[str, Any]:
    options = {"adapter": CASE / "adapter", "packed": packed, "progress": False}
    model, read = bytes_read(lambda: gpt_oss.load(CASE / "model", mesh=mesh, layout=layout, **options))
    alone, whole = bytes_read(lambda: gpt_oss.load(CASE / "model", **options))
    held = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(model)}
    shares = {
        name: [len(leaf.sharding.device_set), leaf.addressable_shards[0].data.nbytes / leaf.nbytes]
        for name, leaf in held.items()
    }
    return {
        "wrong": differences(model, alone.on_mesh(mesh, layout)),
        "read": read == whole,
        "share": {name.replace(".value", ""): share for name, (_, share) in shares.items()},
        "devices": sorted({devices for devices, _ in shares.values()}),
        "held": sum(leaf.addressable_shards[-1].data.nbytes for leaf in jax.tree.leaves(model)),
        "told": told(mesh),
    }


def told(mesh: jax.sharding.Mesh) -> int:
    """Bytes of each device that jmoe doctor tells, but for the cache."""
    machine = Machine({}, (), gpu=False, no_triton="no GPU", tiles=None, no_flash="no GPU", missing=())
    resident = examine_model(CASE / "model", [CASE / "adapter"], machine, batch=8, context=64, mesh=mesh).resident
    return sum(size for kind, size in resident.items() if "cache" not in kind)


def made(mesh: jax.sharding.Mesh, layout: Layout) -> dict[str, Any]:
    options = {"rank": 4, "packed": True}
    alone = random_model(SIZES, **options)
    return {"wrong": differences(random_model(SIZES, mesh=mesh, layout=layout, **options), alone.on_mesh(mesh, layout))}


@jax.jit
def steps(model: GptOss) -> dict[str, Any]:
    last, state = prefill(model, TOKENS, LENGTHS, capacity=32, adapter_ids=IDS)
    return {"prefill": last, "decode": decode(model, TOKENS[:, 0], state)[0]}


@jax.jit
def logits(model: GptOss) -> dict[str, Any]:
    return {"logits": model(TOKENS, adapter_ids=IDS)}


def results(model: GptOss) -> dict[str, Any]:
    """Of one program each."""

    def loss(model: GptOss) -> jax.Array:
        return -log_probs(model, jnp.asarray(TOKENS), adapter_ids=jnp.asarray(IDS)).sum()

    gradient = jax.jit(lambda model: nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
    return {**steps(model), **logits(model), "gradient": gradient(model)}


def error(got: Any, want: Any) -> float:
    """The largest relative error of an array."""
    pairs = [
        [np.asarray(each, np.float64) for each in pair]
        for pair in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    ]
    return max(float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in pairs)


def compared(mesh: jax.sharding.Mesh, layout: Layout, dtype: Any, what: str) -> dict[str, Any]:
    model = random_model(SIZES, rank=4, adapters=2, packed=True)
    model = model.with_adapters(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.lora))
    model.dtype = jnp.dtype(dtype)
    compute = logits if what == "logits" else results
    want, split = compute(model), model.on_mesh(mesh, layout)
    got = compute(split)
    errors = {name: error(got[name], want[name]) for name in want}
    if what == "logits":
        return {"errors": errors, "spec": str(got["logits"].sharding.spec)}
    forward = jax.jit(lambda model: model.hidden(TOKENS)).lower(split.with_adapters(None)).compile().as_text()
    return {"errors": errors, "sent": sorted({name for name, *_ in sent(forward)})}


def shares(mesh: jax.sharding.Mesh, layout: Layout) -> dict[str, Any]:
    model = random_model(SIZES, rank=4, packed=True)
    model = model.with_adapters(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.lora))
    model.dtype = jnp.dtype(jnp.float32)
    dropout = LoraDropout.of(0.2, 3)

    def loss(graph: Any, factors: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        hidden = nnx.merge(graph, factors, frozen).hidden(tokens, dropout=dropout)
        return jnp.sum(hidden[..., 0] ** 2)

    def parts(model: GptOss) -> Any:
        return nnx.split(model, nnx.LoRAParam, ...)

    want = jax.jit(jax.grad(loss, 1), static_argnums=0)(*parts(model), TOKENS)
    graph, factors, frozen = parts(model.on_mesh(mesh, layout))
    specs = nnx.get_partition_spec(factors)
    batch = P(layout.axes_of_batch or None)
    copies = mesh.size // layout.size(mesh, *layout.axes_of_batch)

    def of_device(factors: Any, frozen: Any, tokens: jax.Array) -> Any:
        gradient = jax.grad(lambda factors: loss(graph, factors, frozen, tokens) / copies)(factors)
        over = lambda spec: tuple(name for name in layout.axes if name not in names_of(spec))  # noqa: E731
        return jax.tree.map(lambda leaf, spec: jax.lax.psum(leaf, over(spec)), gradient, specs)

    split = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(specs, nnx.get_partition_spec(frozen), batch),
        out_specs=specs,
        check_vma=False,
    )
    return {"errors": {"gradient": error(jax.jit(split)(factors, frozen, TOKENS), want)}}


def run(case: str) -> dict[str, Any]:
    what, text, fsdp, dtype = case.split("/")
    mesh = make_mesh(text)
    layout = Layout.of(mesh, fsdp=fsdp == "fsdp")
    if what == "load":
        return loaded(mesh, layout, packed=dtype == "packed")
    if what == "share":
        return shares(mesh, layout)
    return made(mesh, layout) if what == "made" else compared(mesh, layout, dtype, what)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        print(json.dumps({case: run(case)}), flush=True)
