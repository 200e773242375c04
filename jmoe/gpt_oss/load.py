"""Reads a checkpoint into a model, layer by layer, each straight to its place on the device."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from jmoe.adapters.settings import LoraBLayout
from jmoe.checkpoint import EMBEDDING, Checkpoint, Spec, check_specs, load_moe_layer, moe_specs
from jmoe.gpt_oss.adapter import load_adapters
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.weights import ATTENTION, LayerWeights, Linear, sizes
from jmoe.ops.launch.local_gpu import reads_packed_here
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4
from jmoe.ops.packed import empty_packed, pack_into

NORM, HEAD = "model.norm.weight", "lm_head.weight"
FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
)
"""What of a repository on the Hub a model and its text need; gpt-oss's have the weights again, in folders of others."""


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
    lora_b_layout: LoraBLayout | None = None,
) -> GptOss:
    """The model of a directory in Hugging Face's layout, or of a repository on the Hub.

    Shards are read tensor by tensor, on the host one layer at most. The device holds beside the model at most one array
    of a layer, or one expert while it is packed: the stacked arrays are updated in place.

    Args:
      mesh: every array is whole on each of its devices, for batches that jax.shard_map splits; None: JAX's default
        device holds them.
      adapter: a PEFT adapter's directory, or several, which adapter_ids count in this order; see
        jmoe.gpt_oss.load_adapter.
      dtype, recompute, remat: as in GptOss. The weights keep their own dtypes.
      packed: experts as jmoe.pack lays them out; None: where JAX's default device has kernels that read them.
      progress: show a bar on a terminal.
      lora_b_layout: for adapters that do not say it themselves; see jmoe.gpt_oss.load_adapter. Of several it must not
        be for some with Unsloth's mark and some without.

    Raises:
      FileNotFoundError: neither the directory nor a repository of that name is there; a file is missing.
      ValueError: a setting, tensor or file that does not fit; the message names it.
      ImportError: packed is None, the default device a GPU, and Triton or jax-triton is missing or too old.
    """
    directory = local_directory(path)
    config = Config.load(directory)
    checkpoint = Checkpoint(directory)
    check_layers(checkpoint, config)
    directories = [adapter] if isinstance(adapter, str | os.PathLike) else adapter or []
    lora = load_adapters(directories, config, lora_b_layout=lora_b_layout)
    packed = reads_packed_here() if packed is None else packed
    device = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    embedding, norm, head = (jax.device_put(checkpoint.tensor(name), device) for name in (EMBEDDING, NORM, HEAD))
    stack = None
    for index in steps(config.num_hidden_layers, f"loading {directory.name}", progress):
        layer = read_layer(checkpoint, config, index)
        if stack is None:
            stack = empty_stack(layer, config.num_hidden_layers, packed, device)
        # The host waits, so that what it read of one layer is gone from both before the next is there.
        stack = jax.block_until_ready(put_layer(stack, layer, index))
        del layer
    assert stack is not None
    return GptOss(
        config,
        embedding=embedding,
        layers=stack,
        norm=norm,
        head=head,
        lora=jax.device_put(lora, device),
        dtype=dtype,
        recompute=recompute,
        remat=remat,
    )


def empty_stack(layer: LayerWeights, layers: int, packed: bool = False, device: Sharding | None = None) -> LayerWeights:
    """Room for so many layers like this one; for its MXFP4 experts packed, if they are to be."""

    def room(leaf: Any) -> Any:
        if isinstance(leaf, Mxfp4):
            experts, n, k = leaf.shape
            return empty_packed(layers, experts, n=n, k=k, device=device)
        return jnp.zeros((layers, *leaf.shape), leaf.dtype, device=device)

    return jax.tree.map(room, layer, is_leaf=lambda leaf: packed and isinstance(leaf, Mxfp4))


def put_layer(stack: LayerWeights, layer: LayerWeights, index: int) -> LayerWeights:
    """The stack with a layer in its place, in the stack's own memory; MXFP4 experts are packed on the way if it is."""

    def put_one(stacked: Any, one: Any) -> Any:
        if isinstance(stacked, PackedMxfp4) and isinstance(one, Mxfp4):
            return pack_into(stacked, beside(one, stacked.words), index)
        return jax.tree.map(
            lambda stacked_leaf, leaf: put(stacked_leaf, beside(leaf, stacked_leaf), index), stacked, one
        )

    return jax.tree.map(put_one, stack, layer, is_leaf=lambda leaf: isinstance(leaf, PackedMxfp4 | Mxfp4))


def beside[T](tree: T, stacked: Array) -> T:
    """The tree on all devices of the stack's mesh, if it has one."""
    if not isinstance(stacked.sharding, NamedSharding):
        return tree
    return jax.device_put(tree, NamedSharding(stacked.sharding.mesh, PartitionSpec()))


@functools.partial(jax.jit, donate_argnums=0)
def put(stacked: Shaped[Array, "L ..."], leaf: Shaped[Array, "..."], index: int) -> Shaped[Array, "L ..."]:
    """One array of the stack with a layer's in its place."""
    return lax.dynamic_update_index_in_dim(stacked, leaf, index, axis=0)


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
    """Raises as load does unless all tensors have their dtypes and shapes; reads headers only."""
    vocabulary = Spec("BF16", (config.vocab_size, config.hidden_size))
    specs = {
        EMBEDDING: vocabulary,
        HEAD: vocabulary,
        NORM: Spec("BF16", (config.hidden_size,)),
    }
    for layer in range(config.num_hidden_layers):
        specs |= attention_specs(config, layer)
        for part in moe_specs(checkpoint, layer):
            specs |= part
    check_specs(checkpoint, specs)


def read_layer(checkpoint: Checkpoint, config: Config, index: int) -> LayerWeights:
    """One layer as numpy arrays."""
    prefix = f"model.layers.{index}."
    moe = load_moe_layer(checkpoint, index, on_host=True)

    def linear(*names: str) -> Linear:
        """The products of these names as one, their rows behind each other."""
        weight, bias = (
            np.concatenate([checkpoint.tensor(f"{prefix}self_attn.{name}_proj.{part}") for name in names])
            for part in ("weight", "bias")
        )
        return Linear(weight, bias)  # type: ignore[arg-type]

    return LayerWeights(
        attention_norm=checkpoint.tensor(f"{prefix}input_layernorm.weight"),  # type: ignore[arg-type]
        qkv=linear("q", "k", "v"),
        o=linear("o"),
        sinks=checkpoint.tensor(f"{prefix}self_attn.sinks"),  # type: ignore[arg-type]
        moe_norm=moe.norm_weight,
        router=Linear(moe.router_weight, moe.router_bias),
        experts=moe.experts,
    )
