"""A checkpoint from disk to the device: how long, and in how much memory of host and device."""

import dataclasses
import json
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jmoe.bench.model.case import Figures, ModelCase
from jmoe.bench.model.memory import anonymous_gib, in_use_gib, peak_gib
from jmoe.checkpoint.directory import EMBEDDING
from jmoe.checkpoint.moe_layer import moe_specs
from jmoe.checkpoint.tensors import Spec
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.load import HEAD, NORM, attention_specs, load


def measure(case: ModelCase) -> Figures:
    """Of `jmoe.gpt_oss.load` on a checkpoint of random bytes, written for this."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), case.config)
        jnp.zeros(1).block_until_ready()
        before = anonymous_gib()
        most = [before]
        done = threading.Event()
        watch = threading.Thread(target=sample, args=(most, done))
        watch.start()
        began = time.perf_counter()
        model = load(folder, progress=False)
        jax.block_until_ready(jax.tree.leaves(model))
        took = time.perf_counter() - began
        done.set()
        watch.join()
        held = in_use_gib()
    peak = peak_gib()
    return {
        "load_seconds": took,
        "host_gib_above_start": max(most) - before,
        "device_gib": held,
        "device_peak_over_final": None if held is None or peak is None else peak / held,
    }


def sample(most: list[float], done: threading.Event) -> None:
    """Appends this process's anonymous memory every few milliseconds."""
    while not done.wait(0.005):
        most.append(anonymous_gib())


def write_checkpoint(folder: Path, config: Config) -> None:
    """Random weights in Hugging Face's layout, a shard for each layer and one for the rest."""
    vocabulary = Spec("BF16", (config.vocab_size, config.hidden_size))
    rest = {EMBEDDING: vocabulary, NORM: Spec("BF16", (config.hidden_size,)), HEAD: vocabulary}
    shards = [rest, *(layer_specs(config, index) for index in range(config.num_hidden_layers))]
    random = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for index, specs in enumerate(shards):
        name = f"model-{index:05d}.safetensors"
        save_file({tensor: random_tensor(random, tensor, spec) for tensor, spec in specs.items()}, folder / name)
        weight_map |= dict.fromkeys(specs, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    names = {field.name for field in dataclasses.fields(config)} - {"rope", "swiglu_alpha"}
    entries = {name: getattr(config, name) for name in names}
    rope = {"rope_type": "yarn", **dataclasses.asdict(config.rope)}
    (folder / "config.json").write_text(json.dumps({**entries, "rope_parameters": rope}))


def layer_specs(config: Config, index: int) -> dict[str, Spec]:
    """The header of every tensor of a layer whose experts are in MXFP4."""
    gate_up, down, others = moe_specs(config, index, lambda _: True)
    return attention_specs(config, index) | others | gate_up | down


def random_tensor(random: np.random.Generator, name: str, spec: Spec) -> np.ndarray:
    """Of this header; scale bytes stand for about a hundredth."""
    if name.endswith("_scales"):
        return random.integers(119, 123, spec.shape, np.uint8)
    if spec.dtype == "U8":
        return random.integers(0, 256, spec.shape, np.uint8)
    return (random.random(spec.shape, np.float32) - 0.5).astype(ml_dtypes.bfloat16) * ml_dtypes.bfloat16(0.05)
