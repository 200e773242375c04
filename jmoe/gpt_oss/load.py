"""Reads a checkpoint into a model, layer by layer, each straight to its place on the device."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jmoe.checkpoint import EMBEDDING, Checkpoint, Spec, check_specs, load_moe_layer
from jmoe.gpt_oss.adapter import load_adapter, stack_adapters
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.weights import ATTENTION, LayerWeights, Linear, sizes
from jmoe.ops.launch import reads_packed_here
from jmoe.ops.mxfp4 import Mxfp4
from jmoe.ops.packed import pack

NORM, HEAD = "model.norm.weight", "lm_head.weight"
FILES = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
)
"""What of a repository on the Hub a model and its text need."""


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    packed: bool | None = None,
    recompute: bool = False,
    remat: bool = False,
    progress: bool = True,
) -> GptOss:
    """The model of a directory in Hugging Face's layout, or of a repository on the Hub.

    Shards are read tensor by tensor. A layer is packed on the device and copied into the stacked arrays, which are
    updated in place, so that beside the model one layer is held at most.

    Args:
      mesh: every array is whole on each of its devices, for batches that jax.shard_map splits; None: JAX's default
        device holds them.
      adapter: a PEFT adapter's directory, or several, which adapter_ids count in this order; see
        jmoe.gpt_oss.load_adapter.
      dtype, recompute, remat: as in GptOss. The weights keep their own dtypes.
      packed: experts as jmoe.pack lays them out; None: where JAX's default device has kernels that read them.
      progress: show a bar on a terminal.

    Raises:
      FileNotFoundError: neither the directory nor a repository of that name is there; a file is missing.
      ValueError: a setting, tensor or file that does not fit; the message names it.
    """
    directory = local_directory(path)
    config = Config.load(directory)
    checkpoint = Checkpoint(directory)
    check_layers(checkpoint, config)
    directories = [adapter] if isinstance(adapter, str | os.PathLike) else adapter or []
    adapters = [load_adapter(one, config) for one in directories]
    lora = stack_adapters(adapters) if adapters else None
    packed = reads_packed_here() if packed is None else packed
    place = functools.partial(replicate, mesh=mesh)
    stack = None
    for index in steps(config.num_hidden_layers, f"loading {directory.name}", progress):
        layer = place(read_layer(checkpoint, config, index, packed))
        if stack is None:
            stack = jax.tree.map(functools.partial(empty_stack, layers=config.num_hidden_layers), layer)
        stack = put(stack, layer, index)
    assert stack is not None
    return GptOss(
        config,
        embedding=place(to_device(checkpoint.tensor(EMBEDDING))),
        layers=stack,
        norm=place(to_device(checkpoint.tensor(NORM))),
        head=place(to_device(checkpoint.tensor(HEAD))),
        lora=place(lora),
        dtype=dtype,
        recompute=recompute,
        remat=remat,
    )


def replicate[T](tree: T, mesh: Mesh | None) -> T:
    """The arrays of a pytree, whole on each device of the mesh, or where they are without one."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def empty_stack(leaf: jax.Array, layers: int) -> jax.Array:
    """Room for an array of every layer, on the devices of one layer's."""
    return jnp.zeros((layers, *leaf.shape), leaf.dtype, device=leaf.sharding)


@functools.partial(jax.jit, donate_argnums=0)
def put(stack: LayerWeights, layer: LayerWeights, index: int) -> LayerWeights:
    """The stack with a layer in its place, in the stack's own memory."""
    return jax.tree.map(
        lambda stacked, leaf: lax.dynamic_update_index_in_dim(stacked, leaf, index, axis=0), stack, layer
    )


def local_directory(path: str | os.PathLike[str]) -> Path:
    """The checkpoint's directory, fetched from the Hub if the path is none."""
    directory = Path(path)
    if directory.is_dir():
        return directory
    name = os.fspath(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"checkpoint directory {directory} does not exist")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{name} is no directory, and could not be fetched from the Hugging Face Hub: {first}"
        ) from error


def steps(count: int, description: str, progress: bool) -> Iterator[int]:
    """0 to count - 1, with a bar if that is wanted and there is a terminal."""
    if not progress:
        yield from range(count)
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(range(count), description, console=console, disable=not console.is_terminal)


def attention_specs(config: Config, layer: int) -> dict[str, Spec]:
    """The header of every tensor of a layer's attention and its norm."""
    prefix = f"model.layers.{layer}."
    specs = {
        f"{prefix}input_layernorm.weight": Spec("BF16", (config.hidden_size,)),
        f"{prefix}self_attn.sinks": Spec("BF16", (config.num_attention_heads,)),
    }
    for name in ATTENTION:
        n, k = sizes(config)[name]
        specs |= {
            f"{prefix}self_attn.{name}_proj.weight": Spec("BF16", (n, k)),
            f"{prefix}self_attn.{name}_proj.bias": Spec("BF16", (n,)),
        }
    return specs


def check_layers(checkpoint: Checkpoint, config: Config) -> None:
    """Raises as load does unless the tensors outside of the experts have their dtypes and shapes; reads headers only.

    The experts' are compared as each layer is read.
    """
    vocabulary = Spec("BF16", (config.vocab_size, config.hidden_size))
    specs = {
        EMBEDDING: vocabulary,
        HEAD: vocabulary,
        NORM: Spec("BF16", (config.hidden_size,)),
    }
    for layer in range(config.num_hidden_layers):
        specs |= attention_specs(config, layer)
    check_specs(checkpoint, specs)


def read_layer(checkpoint: Checkpoint, config: Config, index: int, packed: bool) -> LayerWeights:
    """One layer on the device."""
    prefix = f"model.layers.{index}."
    read: Callable[[str], jax.Array] = lambda name: to_device(checkpoint.tensor(prefix + name))  # noqa: E731
    moe = load_moe_layer(checkpoint, index)
    experts = moe.experts
    if packed and isinstance(experts.gate_up, Mxfp4):
        experts = pack(experts)

    def linear(*names: str) -> Linear:
        """The products of these names as one, their rows behind each other."""
        weight, bias = (
            np.concatenate([checkpoint.tensor(f"{prefix}self_attn.{name}_proj.{part}") for name in names])
            for part in ("weight", "bias")
        )
        return Linear(to_device(weight), to_device(bias))

    return LayerWeights(
        attention_norm=read("input_layernorm.weight"),
        qkv=linear("q", "k", "v"),
        o=linear("o"),
        sinks=read("self_attn.sinks"),
        moe_norm=moe.norm_weight,
        router=Linear(moe.router_weight, moe.router_bias),
        experts=experts,
    )


def to_device(array: np.ndarray) -> jax.Array:
    """The array on the default device."""
    return jnp.asarray(array)
