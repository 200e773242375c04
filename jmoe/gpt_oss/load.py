"""Reads a checkpoint into a model, layer by layer, each straight to its place on the device."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jmoe.adapters.settings import LoraBLayout
from jmoe.checkpoint.directory import EMBEDDING, Checkpoint, check_specs
from jmoe.checkpoint.moe_layer import load_moe_layer, moe_specs
from jmoe.checkpoint.tensors import Spec
from jmoe.errors import first_line
from jmoe.gpt_oss.adapter import load_adapters
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layer import Remat
from jmoe.gpt_oss.layout import Layout, with_auto_axes
from jmoe.gpt_oss.load_on_mesh import MeshReader
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.stack import DenseExperts, empty_stack, put_layer
from jmoe.gpt_oss.weights import ATTENTION, EXPERTS, LayerWeights, Linear, sizes
from jmoe.ops.launch.local_gpu import reads_packed_here
from jmoe.ops.mxfp4 import BLOCK

Quantize = Literal["mxfp4"]  # typer resolves no `type` statement

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
    layout: Layout | None = None,
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    packed: bool | None = None,
    quantize: Quantize | None = None,
    remat: Remat = "nothing",
    progress: bool = True,
    lora_b_layout: LoraBLayout | None = None,
) -> GptOss:
    """The model of a directory in Hugging Face's layout or OpenAI's own, or of a repository on the Hub.

    Shards are read tensor by tensor, on the host one layer at most. The device holds beside the model at most one array
    of a layer, or one expert while it is packed or rounded: the stacked arrays are updated in place. Dense weights are
    rounded to bfloat16 where the file has them in float32 or float16, which a warning says. docs/checkpoints.md lists
    what is read.

    Args:
      mesh: the devices, of one process or several; None: JAX's default device.
      layout: how the mesh splits the model: each process reads only what its devices hold, and the host holds one
        expert of each of them at a time; adapters are read whole. None: every array is whole on each device of the
        mesh, for batches that jax.shard_map splits.
      adapter: a PEFT adapter's directory, or several, which adapter_ids count in this order; see
        jmoe.gpt_oss.load_adapter.
      dtype: as in GptOss. The weights keep their own dtypes.
      remat: as in GptOss.
      packed: experts as jmoe.pack lays them out; None: where JAX's default device has kernels that read them.
      quantize: "mxfp4" rounds dense experts to MXFP4, one at a time and from the file's own dtype, as jmoe.quantize
        does; those that are MXFP4 already stay as they are. None: dense experts stay dense.
      progress: show a bar on a terminal.
      lora_b_layout: for adapters that do not say it themselves; see jmoe.gpt_oss.load_adapter. Of several it must not
        be for some with Unsloth's mark and some without.

    Raises:
      FileNotFoundError: neither the directory nor a repository of that name is there; a file is missing.
      ValueError: a setting, tensor or file that does not fit; the message names it.
      ImportError: packed is None, the default device a GPU, and Triton or jax-triton is missing or too old.
    """
    if layout is not None and mesh is None:
        raise ValueError("a layout needs the mesh that it is of, got mesh None")
    directory = local_directory(path)
    config = Config.load(directory)
    if layout is not None and mesh is not None:
        layout.check(mesh, config)
    checkpoint = Checkpoint(directory)
    check_layers(checkpoint, config, quantize)
    directories = [adapter] if isinstance(adapter, str | os.PathLike) else adapter or []
    lora = load_adapters(directories, config, lora_b_layout=lora_b_layout)
    packed = reads_packed_here() if packed is None else packed
    bar = steps(config.num_hidden_layers, f"loading {directory.name}", progress)
    if layout is not None and mesh is not None:
        mesh = with_auto_axes(mesh)
        reader = MeshReader(checkpoint, config, mesh, layout, quantize is not None, packed)
        return GptOss(
            config,
            embedding=reader.whole(EMBEDDING),
            layers=reader.stack(bar),
            norm=reader.whole(NORM),
            head=reader.whole(HEAD),
            lora=lora and layout.place(mesh, lora, layout.lora(lora)),
            dtype=dtype,
            remat=remat,
            layout=layout,
        )
    device = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    embedding, norm, head = (jax.device_put(checkpoint.tensor(name), device) for name in (EMBEDDING, NORM, HEAD))
    stack = None
    for index in bar:
        layer = read_layer(checkpoint, config, index, quantize)
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
        remat=remat,
    )


def local_directory(path: str | os.PathLike[str]) -> Path:
    """The checkpoint's directory, fetched from the Hub if the path is none."""
    name = os.fspath(path)
    if not name.strip():
        raise FileNotFoundError("the checkpoint must be a directory or a repository on the Hub, got an empty path")
    directory = Path(path)
    if directory.is_dir():
        return directory
    if name.count("/") == 2 and name.endswith("/original") and not name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name} is not a directory; of the Hub give {name.removesuffix('/original')}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"checkpoint directory {directory} does not exist")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is not a directory, and could not be fetched from the Hugging Face Hub: {first_line(error)}"
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


def check_layers(
    checkpoint: Checkpoint, config: Config, quantize: Quantize | None = None, *, stacked: bool = True
) -> dict[str, Spec]:
    """The header in the checkpoint's view of every tensor of the model; reads headers only.

    Args:
      stacked: whether all layers' experts are to be in one array, which those in MXFP4 and dense ones cannot.

    Raises:
      ValueError, FileNotFoundError: as load does, unless all tensors have their dtypes and shapes.
    """
    if quantize not in (None, "mxfp4"):
        raise ValueError(f'quantize must be "mxfp4" or None, got {quantize!r}')
    layers = config.num_hidden_layers
    if checkpoint.layers < layers:
        raise ValueError(
            f"{checkpoint.path} has tensors of {checkpoint.layers} layers, and num_hidden_layers in its config.json is "
            f"{layers}"
        )
    if checkpoint.layers > layers:
        checkpoint.say("layers", f"layers from {layers} on are not used: num_hidden_layers in config.json is {layers}")
    vocabulary = Spec("BF16", (config.vocab_size, config.hidden_size))
    specs = {
        EMBEDDING: vocabulary,
        HEAD: vocabulary,
        NORM: Spec("BF16", (config.hidden_size,)),
    }
    for layer in range(layers):
        specs |= attention_specs(config, layer)
        for part in moe_specs(config, layer, checkpoint.is_packed):
            specs |= part
    check_specs(checkpoint, specs)
    for projection in EXPERTS if stacked else ():
        check_experts(checkpoint, config, projection, quantize)
    return specs


def check_experts(checkpoint: Checkpoint, config: Config, projection: str, quantize: Quantize | None) -> None:
    """Raises ValueError unless one projection's experts can be stacked as they are, or rounded."""
    names = [f"model.layers.{layer}.mlp.experts.{projection}_proj" for layer in range(config.num_hidden_layers)]
    dense = [name for name in names if not checkpoint.is_packed(name)]
    if quantize is None and 0 < len(dense) < len(names):
        raise ValueError(
            f'{checkpoint.path} has experts in MXFP4 and dense ones ({dense[0]}), which quantize="mxfp4" (--quantize '
            "mxfp4) rounds too"
        )
    width = sizes(config)[projection][1]
    if quantize is not None and dense and width % BLOCK:
        raise ValueError(f"{dense[0]} cannot be MXFP4, whose blocks have {BLOCK} values: its input size is {width}")


def read_layer(checkpoint: Checkpoint, config: Config, index: int, quantize: Quantize | None = None) -> LayerWeights:
    """One layer as numpy arrays; dense experts that are to be rounded stay in the file."""
    prefix = f"model.layers.{index}."
    read_dense = None if quantize is None else DenseExperts
    moe = load_moe_layer(checkpoint, index, on_host=True, read_dense=read_dense)

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
