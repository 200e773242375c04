"""gpt-oss checkpoints in the Hugging Face layout: read tensor by tensor, and one mixture-of-experts layer at a time.

A checkpoint is a directory with config.json and either one model.safetensors or several shards listed by
model.safetensors.index.json. Experts stay in MXFP4; only the tensors asked for are read.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, get_type_hints

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer
from safetensors import SafetensorError, safe_open

from jmoe.ops.experts import Experts
from jmoe.ops.mxfp4 import BLOCK, Mxfp4

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"

# safetensors asks numpy for a dtype called "bfloat16", which exists once ml_dtypes is imported.
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Spec(NamedTuple):
    """A tensor's header: the dtype as safetensors spells it (BF16, U8, F32, ...) and the shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it does not hold a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    """Opens a safetensors file for numpy; its header is read, its data is not.

    Raises:
      FileNotFoundError: the file does not exist.
      PermissionError: it may not be read.
      ValueError: it is truncated or corrupt.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    file.open("rb").close()  # safetensors' own error would be that it does not exist
    try:
        handle = safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
    with handle:
        yield handle


def tensor_spec(shard: safe_open, name: str) -> Spec:
    """The header of one tensor of an open safetensors file."""
    header = shard.get_slice(name)
    return Spec(header.get_dtype(), tuple(header.get_shape()))


def is_number(value: object, kind: type) -> bool:
    """Whether a JSON value is positive, finite and of the kind int or float: an int is a float too, a bool neither."""
    accepted = (int,) if kind is int else (int, float)
    return isinstance(value, accepted) and not isinstance(value, bool) and 0 < value < math.inf


@dataclasses.dataclass(frozen=True)
class Config:
    """The part of config.json that the mixture-of-experts layers and the embedding need; names as in the file."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    vocab_size: int
    rms_norm_eps: float
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702  # the released files leave it out

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads config.json of a checkpoint directory; `experts_per_token` may stand for `num_experts_per_tok`.

        Raises:
          FileNotFoundError: there is no config.json.
          ValueError: it is not JSON, it is for another architecture, or fields are missing or no positive numbers
            (all are listed).
        """
        file = Path(path) / "config.json"
        entries = read_json(file)
        if entries.get("model_type", "gpt_oss") != "gpt_oss":
            raise ValueError(f"{file}: model_type must be 'gpt_oss', got {entries['model_type']!r}")
        if "experts_per_token" in entries:
            entries.setdefault("num_experts_per_tok", entries["experts_per_token"])
        kinds = get_type_hints(cls)
        given = {name: entries[name] for name in kinds if name in entries}
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        problems = [f"{name} is missing" for name in required if name not in given]
        for name, value in given.items():
            if not is_number(value, kinds[name]):
                problems.append(f"{name} must be a positive {kinds[name].__name__}, got {json.dumps(value)}")
        if problems:
            raise ValueError(f"{file}: {'; '.join(problems)}")
        config = cls(**given)
        if config.num_experts_per_tok > config.num_local_experts:
            raise ValueError(
                f"{file}: num_experts_per_tok must be at most num_local_experts = {config.num_local_experts}, "
                f"got {config.num_experts_per_tok}"
            )
        return config


class Checkpoint:
    """A checkpoint directory. Shards are opened when a tensor in them is asked for, so the others need not exist."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads config.json and the index, or the header of a single model.safetensors where there is one.

        Raises:
          FileNotFoundError: the directory, config.json or both of the weight files' entry points are missing.
          ValueError: config.json or the index is malformed, or the index names a file outside the directory.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"checkpoint directory {self.path} does not exist")
        self.config = Config.load(self.path)
        self._file_of = self._single_file() if (self.path / SINGLE).is_file() else self._indexed_files()

    def _single_file(self) -> dict[str, Path]:
        file = self.path / SINGLE
        with open_safetensors(file) as shard:
            return dict.fromkeys(shard.keys(), file)

    def _indexed_files(self) -> dict[str, Path]:
        index = self.path / INDEX
        if not index.is_file():
            raise FileNotFoundError(f"{self.path} has neither {SINGLE} nor {INDEX}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: weight_map must be a JSON object, got {json.dumps(weight_map)}")
        for name, file in weight_map.items():
            # Not Path.resolve(): in the Hub's cache a shard is a link that leads out of the directory.
            if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
                raise ValueError(
                    f"{index}: {name} must be in a file of the checkpoint's own directory, got {json.dumps(file)}"
                )
        return {name: self.path / file for name, file in weight_map.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that the checkpoint lists."""
        return tuple(self._file_of)

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint lists a tensor of this name."""
        return name in self._file_of

    @contextlib.contextmanager
    def _shard_of(self, name: str) -> Iterator[safe_open]:
        if name not in self._file_of:
            raise ValueError(f"{self.path} has no tensor {name}")
        file = self._file_of[name]
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, though {INDEX} places {name} there")
        with open_safetensors(file) as shard:
            if name not in shard.keys():  # noqa: SIM118  the handle itself is no container
                raise ValueError(f"{file} has no tensor {name}, though {INDEX} places it there")
            yield shard

    def spec(self, name: str) -> Spec:
        """A tensor's dtype and shape; no data is read. Raises as `tensor` does."""
        with self._shard_of(name) as shard:
            return tensor_spec(shard, name)

    def tensor(self, name: str) -> np.ndarray:
        """A whole tensor, in the dtype of the file (bfloat16 is ml_dtypes').

        Raises:
          FileNotFoundError: the shard that the index places the tensor in does not exist.
          ValueError: no such tensor in the checkpoint or in its shard, or the shard is truncated or corrupt.
        """
        with self._shard_of(name) as shard:
            return shard.get_tensor(name)

    def rows(self, name: str, ids: Integer[np.ndarray, "..."]) -> np.ndarray:
        """Rows of a tensor, [*ids.shape, *row shape], in the dtype of the file; each row is read once, the rest never.

        Raises:
          ValueError: ids are no integers, or outside the tensor; and as `tensor` does.
        """
        ids = np.asarray(ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"row ids of {name} must be integers, got {ids.dtype}")
        unique, inverse = np.unique(ids, return_inverse=True)
        with self._shard_of(name) as shard:
            table = shard.get_slice(name)
            count = table.get_shape()[0]
            if unique.size and not (unique[0] >= 0 and unique[-1] < count):
                raise ValueError(
                    f"{self._file_of[name]}: row ids of {name} must be in [0, {count}), got {unique[0]} to {unique[-1]}"
                )
            read = [table[i : i + 1] for i in unique.tolist()] or [table[0:0]]
        return np.concatenate(read)[inverse]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeLayer:
    """One layer's mixture of experts with the norm before it; a pytree with a static config.

    norm_weight: bf16 [H]; router_weight: bf16 [E, H]; router_bias: bf16 [E].
    experts: MXFP4 as in the file, or bf16 where the checkpoint is not quantised; biases bf16.
    """

    config: Config = dataclasses.field(metadata={"static": True})
    norm_weight: Float[Array, " H"]
    router_weight: Float[Array, "E H"]
    router_bias: Float[Array, " E"]
    experts: Experts


def load_moe_layer(checkpoint: Checkpoint, layer: int, *, on_host: bool = False) -> MoeLayer:
    """Reads layer `layer`, 0 <= layer < num_hidden_layers; its arrays are numpy's if they are to stay on the host.

    Experts may be packed (`*_blocks`, `*_scales`, uint8) or dense bf16 [E, in, out]: under their plain name, or under
    the name `*_blocks`, where transformers 5 writes them when it saves a model that it has dequantised.

    Raises:
      ValueError: the layer is out of range; or tensors are missing or do not have the dtype and shape that config.json
        calls for (all are listed: name, wanted, got).
      FileNotFoundError: a shard that holds one of the layer's tensors does not exist.
    """
    config = checkpoint.config
    if not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"layer must be in [0, {config.num_hidden_layers}) for {checkpoint.path}, got {layer}")
    prefix = f"model.layers.{layer}."
    norm, router, mlp = f"{prefix}post_attention_layernorm.weight", f"{prefix}mlp.router.", f"{prefix}mlp.experts."
    gate_up, down, others = moe_specs(checkpoint, layer)
    check_specs(checkpoint, others | gate_up | down)

    def read(name: str) -> Any:
        return checkpoint.tensor(name)

    def read_weight(names: dict[str, Spec]) -> Any:
        if len(names) == 2:
            return Mxfp4(*map(read, names))
        (name,) = names
        return read(name).swapaxes(1, 2)  # stored [E, in, out]

    moe = MoeLayer(
        config=config,
        norm_weight=read(norm),
        router_weight=read(f"{router}weight"),
        router_bias=read(f"{router}bias"),
        experts=Experts(
            gate_up=read_weight(gate_up),
            gate_up_bias=read(f"{mlp}gate_up_proj_bias"),
            down=read_weight(down),
            down_bias=read(f"{mlp}down_proj_bias"),
        ),
    )
    return moe if on_host else jax.tree.map(jnp.asarray, moe)


def moe_specs(checkpoint: Checkpoint, layer: int) -> tuple[dict[str, Spec], dict[str, Spec], dict[str, Spec]]:
    """The headers that a layer's gate_up, its down, and its norm, router and biases must have."""
    config = checkpoint.config
    experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
    prefix = f"model.layers.{layer}."
    norm, router, mlp = f"{prefix}post_attention_layernorm.weight", f"{prefix}mlp.router.", f"{prefix}mlp.experts."
    gate_up = _weight_specs(checkpoint, f"{mlp}gate_up_proj", rows=2 * inner, columns=hidden)
    down = _weight_specs(checkpoint, f"{mlp}down_proj", rows=hidden, columns=inner)
    others = {
        norm: Spec("BF16", (hidden,)),
        f"{router}weight": Spec("BF16", (experts, hidden)),
        f"{router}bias": Spec("BF16", (experts,)),
        f"{mlp}gate_up_proj_bias": Spec("BF16", (experts, 2 * inner)),
        f"{mlp}down_proj_bias": Spec("BF16", (experts, hidden)),
    }
    return gate_up, down, others


def _weight_specs(checkpoint: Checkpoint, name: str, *, rows: int, columns: int) -> dict[str, Spec]:
    """The tensors that must hold one projection, given which of the three forms the checkpoint uses."""
    experts = checkpoint.config.num_local_experts
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    dense = Spec("BF16", (experts, columns, rows))
    if blocks in checkpoint and checkpoint.spec(blocks).dtype != "U8":
        return {blocks: dense}
    if blocks not in checkpoint and name in checkpoint:
        return {name: dense}
    if columns % BLOCK:
        raise ValueError(f"{blocks} packs blocks of {BLOCK} values, so its input size cannot be {columns}")
    groups = columns // BLOCK
    return {blocks: Spec("U8", (experts, rows, groups, BLOCK // 2)), scales: Spec("U8", (experts, rows, groups))}


def check_specs(checkpoint: Checkpoint, wanted: dict[str, Spec]) -> None:
    """Compares headers, so that nothing is read of a layer that does not fit."""
    got = {name: checkpoint.spec(name) if name in checkpoint else "no such tensor" for name in wanted}
    wrong = [f"  {name}: wanted {wanted[name]}, got {got[name]}" for name in wanted if got[name] != wanted[name]]
    if wrong:
        raise ValueError("\n".join([f"{checkpoint.path} does not match its config.json:", *wrong]))


def embed(checkpoint: Checkpoint, token_ids: Integer[np.ndarray, " T"]) -> Float[Array, "T H"]:
    """The embedding rows of token ids, bf16; no other row of the table is read.

    Raises:
      ValueError: the table does not match config.json, or an id is outside the vocabulary; and as
        `Checkpoint.tensor` does.
    """
    check_specs(checkpoint, {EMBEDDING: Spec("BF16", (checkpoint.config.vocab_size, checkpoint.config.hidden_size))})
    return jnp.asarray(checkpoint.rows(EMBEDDING, token_ids))


def router_logits(layer: MoeLayer, x: Float[Array, "... H"]) -> Float[Array, "... E"]:
    """x @ router_weight.T + router_bias for normalised x: summed in float32, rounded once to x's dtype."""
    logits = jnp.einsum(
        "...h,eh->...e",
        x,
        layer.router_weight.astype(x.dtype),
        precision=lax.Precision.HIGHEST,  # float32 x: a GPU would round to TF32
        preferred_element_type=jnp.float32,
    )
    return (logits + jnp.broadcast_to(layer.router_bias.astype(jnp.float32), logits.shape)).astype(x.dtype)
