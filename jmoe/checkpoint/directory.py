"""gpt-oss checkpoints, read tensor by tensor.

A checkpoint is a directory with config.json and either one model.safetensors or several shards listed by
model.safetensors.index.json, in Hugging Face's layout or in OpenAI's own (the folder `original/` of the released
models). Packed experts stay in MXFP4; only the tensors asked for are read.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jmoe.checkpoint.config_file import (
    CheckpointWarning,
    Config,
    in_json,
    is_original,
    model_entries,
    number,
    read_json,
)
from jmoe.checkpoint.layouts import EXPERTS, LAYER, HeadSizes, Part, grouped, input_first, layout_of, why_not
from jmoe.checkpoint.tensors import READ_AS, Spec, as_bfloat16, read_tensor, tensor_spec
from jmoe.extras import require

if TYPE_CHECKING:
    from safetensors import safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"


@contextlib.contextmanager
def open_safetensors(file: Path) -> "Iterator[safe_open]":
    """Opens a safetensors file for numpy; its header is read, its data is not.

    Raises:
      FileNotFoundError: the file does not exist.
      PermissionError: it may not be read.
      ValueError: it is truncated or corrupt.
      ImportError: safetensors is not installed.
    """
    require("reading checkpoints", "model", "safetensors")
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    file.open("rb").close()  # safetensors' own error would be that it does not exist
    try:
        handle = safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
    with handle:
        yield handle


class Checkpoint:
    """A checkpoint directory, in one view for all layouts: see jmoe.checkpoint.layouts.

    Shards are opened when a tensor in them is asked for, so the others need not exist.
    """

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
        self._file_of = self._files()
        self._layout = layout_of(self._file_of, self._head_sizes)
        self._input_first: dict[int, bool] = {}
        self._said: set[str] = set()

    def _files(self) -> dict[str, Path]:
        if (self.path / SINGLE).is_file():
            return names_in(self.path / SINGLE)
        if (self.path / INDEX).is_file():
            return indexed_files(self.path)
        shards = sorted(self.path.glob("*.safetensors"))
        if shards and is_original(read_json(self.path / "config.json")):  # OpenAI's own code needs no index
            return {name: file for shard in shards for name, file in names_in(shard).items()}
        raise FileNotFoundError(f"{self.path} has neither {SINGLE} nor {INDEX}")

    def _head_sizes(self) -> HeadSizes:
        entries = model_entries(self.path)
        sizes = []
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            sizes.append(number(entries.get(name), int))
            if sizes[-1] is None:
                raise ValueError(
                    f"{self.path / 'config.json'}: {name} must be a positive int, got {in_json(entries.get(name))}"
                )
        queries, keys, width = sizes
        return HeadSizes(queries * width, keys * width)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that the files list, by their own names."""
        return tuple(self._file_of)

    @property
    def layers(self) -> int:
        """How many layers the files' tensors are of."""
        return 1 + max((int(found[2]) for found in map(LAYER.search, self._file_of) if found), default=-1)

    def __contains__(self, name: str) -> bool:
        """Whether the view has a tensor of this name."""
        return self.part(name).name in self._file_of

    def part(self, name: str) -> Part:
        """Where a tensor of the view lies, if it is there."""
        part = self._layout.locate(name)
        experts = EXPERTS.fullmatch(name)
        if experts is None:
            return part
        layer = int(experts[1])
        if layer not in self._input_first:
            self._input_first[layer] = self._find_input_first(layer)
        return self._dense(name)._replace(swapped=not self._input_first[layer])

    def _dense(self, name: str) -> Part:
        """Where dense experts lie: transformers 5 up to 5.23 wrote them under the name of packed blocks."""
        part, packed = self._layout.locate(name), self._layout.locate(f"{name}_blocks")
        return packed if part.name not in self._file_of and packed.name in self._file_of else part

    def _find_input_first(self, layer: int) -> bool:
        """Whether dense experts of a layer are [E, in, out] in the files."""
        names = {which: f"model.layers.{layer}.mlp.experts.{which}_proj" for which in ("gate_up", "down")}
        dense = {which: self._dense(name).name for which, name in names.items() if not self.is_packed(name)}
        shapes = {which: self.stored(name) for which, name in dense.items() if name in self._file_of}
        config = self.config
        first, told_by = input_first(self._layout, shapes, config.hidden_size, config.intermediate_size)
        if told_by is not None and first != self._layout.input_first:
            self.say(
                "swapped",
                f"dense experts are [experts, {'in, out' if first else 'out, in'}], the other way round than usual, "
                f"as {told_by}'s shape {shapes[told_by].shape} tells; the other projection is read the same way",
            )
        elif told_by is None and "down" in shapes and config.hidden_size == config.intermediate_size:
            self.say(
                "untold",
                f"nothing tells whether the square {dense['down']} is [experts, in, out]; it is read as if it were. "
                "jmoe doctor --loss says whether the weights fit together",
            )
        return first

    def say(self, kind: str, message: str) -> None:
        """Warns of this kind of decision, once."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"{self.path}: {message}", CheckpointWarning, stacklevel=2)

    def is_packed(self, name: str) -> bool:
        """Whether experts, by their name if they were dense, are in MXFP4 or, if they are nowhere, could be."""
        blocks = self._layout.locate(f"{name}_blocks").name
        if blocks in self._file_of:
            return self.stored(blocks).dtype == "U8"
        return self._layout.locate(name).name not in self._file_of

    @contextlib.contextmanager
    def _shard_of(self, name: str) -> "Iterator[safe_open]":
        """The file that holds a tensor, by the files' own name for it."""
        if name not in self._file_of:
            raise ValueError(f"{self.path} has no tensor {name}")
        file = self._file_of[name]
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, though {INDEX} places {name} there")
        with open_safetensors(file) as shard:
            if name not in shard.keys():  # noqa: SIM118  the handle itself is not a container
                raise ValueError(f"{file} has no tensor {name}, though {INDEX} places it there")
            yield shard

    def stored(self, name: str) -> Spec:
        """The header of a tensor as it lies in the files, by their own name for it. Raises as `tensor` does."""
        with self._shard_of(name) as shard:
            return tensor_spec(shard, name)

    def spec(self, name: str) -> Spec:
        """A tensor's dtype and shape in the view; no data is read. Raises as `tensor` does."""
        part = self.part(name)
        return part.view(self.stored(part.name))

    def tensor(self, name: str) -> np.ndarray:
        """A whole tensor of the view: bfloat16 (ml_dtypes') where the file has floating-point numbers, or uint8.

        Raises:
          FileNotFoundError: the shard that the index places the tensor in does not exist.
          ValueError: no such tensor in the checkpoint or in its shard, or the shard is truncated or corrupt.
        """
        return self.slices(name)

    def slices(self, name: str, *index: slice) -> np.ndarray:
        """Slices along the first axes of a tensor of the view, as `tensor` has it; the rest is not read.

        index: without steps. Raises as `tensor`.
        """
        part = self.part(name)
        if part.swapped and len(index) > 1:
            whole = [*index, *[slice(None)] * (len(self.stored(part.name).shape) - len(index))]
            index = (*whole[:-2], whole[-1], whole[-2])
        if part.rows is not None:
            first, end, _ = part.rows
            start, stop, _ = (index[0] if index else slice(None)).indices(end - first)
            index = (slice(first + start, first + stop), *index[1:])
        with self._shard_of(part.name) as shard:
            array = read_tensor(self._file_of[part.name], shard, part.name, index)
        return array.swapaxes(-1, -2) if part.swapped else array

    def expert(self, name: str, expert: int) -> np.ndarray:
        """One of dense experts, [in, out], in the file's own dtype; the others are not read. Raises as `tensor`."""
        part = self.part(name)
        with self._shard_of(part.name) as shard:
            array = shard.get_slice(part.name)[expert : expert + 1][0]
        return array.T if part.swapped else array

    def rows(self, name: str, ids: Integer[np.ndarray, "..."]) -> np.ndarray:
        """Rows of a tensor, [*ids.shape, *row shape], as `tensor` has them; each row is read once, the rest never.

        Raises:
          ValueError: ids are not integers, or outside the tensor; and as `tensor` does.
        """
        ids = np.asarray(ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"row ids of {name} must be integers, got {ids.dtype}")
        unique, inverse = np.unique(ids, return_inverse=True)
        stored = self.part(name).name
        with self._shard_of(stored) as shard:
            table = shard.get_slice(stored)
            count = table.get_shape()[0]
            if unique.size and not (unique[0] >= 0 and unique[-1] < count):
                raise ValueError(
                    f"{self._file_of[stored]}: row ids of {name} must be in [0, {count}), "
                    f"got {unique[0]} to {unique[-1]}"
                )
            read = np.concatenate([table[i : i + 1] for i in unique.tolist()] or [table[0:0]])
            converted = READ_AS.get(table.get_dtype()) == "BF16"
        return (as_bfloat16(read) if converted else read)[inverse]


def indexed_files(path: Path) -> dict[str, Path]:
    """Every tensor that a directory's index names, and its file.

    Raises:
      ValueError: the index is malformed, or names a file outside the directory.
    """
    index = path / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map must be a JSON object, got {in_json(weight_map)}")
    for name, file in weight_map.items():
        # Not Path.resolve(): in the Hub's cache a shard is a link that leads out of the directory.
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise ValueError(
                f"{index}: {name} must be in a file of the checkpoint's own directory, got {in_json(file)}"
            )
    return {name: path / file for name, file in weight_map.items()}


def names_in(file: Path) -> dict[str, Path]:
    """Every tensor of one file, and that file."""
    with open_safetensors(file) as shard:
        return dict.fromkeys(shard.keys(), file)


def check_specs(checkpoint: Checkpoint, wanted: dict[str, Spec]) -> None:
    """Compares headers, so that nothing is read of a layer that does not fit; warns of dtypes that are rounded.

    Raises:
      ValueError: tensors are missing or have another dtype or shape: each kind is listed, by the files' own names.
    """
    wrong: dict[tuple[str, str], None] = {}
    rounded = set()
    for name, spec in wanted.items():
        part = checkpoint.part(name)
        stored = checkpoint.stored(part.name) if name in checkpoint else None
        if stored is None or part.view(stored) != spec:
            wrong[part.name, f"wanted {part.stored(spec)}, got {stored or 'no such tensor'}"] = None
        elif spec.dtype == "BF16" != stored.dtype:
            rounded.add(stored.dtype)
    if wrong:
        lines = [f"  {line}" for line in grouped(wrong)]
        raise ValueError(
            "\n".join([f"{checkpoint.path} does not match its config.json:", *lines, *why_not(checkpoint.names)])
        )
    for dtype in sorted(rounded):
        checkpoint.say(dtype, f"{'float32' if dtype == 'F32' else 'float16'} weights are rounded to bfloat16")


def embed(checkpoint: Checkpoint, token_ids: Integer[np.ndarray, " T"]) -> Float[Array, "T H"]:
    """The embedding rows of token ids, bf16; no other row of the table is read.

    Raises:
      ValueError: the table does not match config.json, or an id is outside the vocabulary; and as
        `Checkpoint.tensor` does.
    """
    check_specs(checkpoint, {EMBEDDING: Spec("BF16", (checkpoint.config.vocab_size, checkpoint.config.hidden_size))})
    return jnp.asarray(checkpoint.rows(EMBEDDING, token_ids))
