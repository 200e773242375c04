"""The mixture-of-experts block of a Qwen3-MoE or Mixtral model, as Hugging Face's files and modules have it."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jmoe.checkpoint.config_file import in_json, read_json
from jmoe.checkpoint.directory import INDEX, SINGLE, indexed_files, names_in, open_safetensors
from jmoe.checkpoint.tensors import BFLOAT16, read_tensor
from jmoe.ops.check import as_count
from jmoe.ops.experts import Experts
from jmoe.ops.mxfp4 import BLOCK, Mxfp4, quantize
from jmoe.triton_src.scoring import Scoring

type Family = Literal["qwen3_moe", "mixtral"]

MATRICES: dict[str, tuple[str, str, str]] = {
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
    "mixtral": ("w1", "w3", "w2"),
}
"""The names of an expert's gate, up and down, by family; modules of transformers 5 have those of all experts in one."""

ROUTER = "gate.weight"
DTYPES = ("bfloat16", "float32")


class HfBlock(NamedTuple):
    """A block's weights. experts: gate and up alternate; their activation is silu(gate) * up. router_weight: [E, H]."""

    experts: Experts
    router_weight: Float[Array, "E H"]
    top_k: int
    scoring: Scoring


def read_hf_block(
    block: Any,
    *,
    family: Family,
    layer: int | None = None,
    top_k: int | None = None,
    scoring: Scoring | None = None,
    mxfp4: bool = True,
) -> HfBlock:
    """The weights of a block, its experts rounded to MXFP4 one by one as they are read, or as they are.

    Args:
      block: a checkpoint's directory, a mapping of tensors by name (numpy's, JAX's or PyTorch's, such as a state_dict),
        or a module of transformers. Names may have any prefix, and other tensors may stand beside the block's.
      family: the model's kind, as its config.json has it in model_type.
      layer: which block, where there are several.
      top_k: experts a token; None: what config.json or the module says.
      scoring: how logits become weights; None: what config.json, the module or the family says.
      mxfp4: else bfloat16 stays bfloat16, and float32 of mappings and modules float32. float16 is read as bfloat16.

    Raises:
      ValueError: the family is another, the block's tensors are missing, of several blocks, or of a shape or dtype that
        does not fit, or it has others, as blocks of other families do; or nothing says top_k or scoring.
      FileNotFoundError: files of the checkpoint are missing.
    """
    if family not in MATRICES:
        raise ValueError(f"family must be one of {', '.join(MATRICES)}, got {family!r}")
    own_scoring: Scoring | None
    if isinstance(block, str | os.PathLike):
        tensors: Mapping[str, Any] = TensorFiles(Path(block))
        said, own_scoring = _said_by_config(Path(block) / "config.json", family)
    elif isinstance(block, Mapping):
        tensors, said, own_scoring = block, None, Scoring() if family == "mixtral" else None
    elif hasattr(block, "gate"):
        tensors, router = block.state_dict(), block.gate
        said = getattr(router, "top_k", getattr(block, "top_k", None))
        own_scoring = Scoring(renormalize=getattr(router, "norm_topk_prob", getattr(block, "norm_topk_prob", True)))
    else:
        raise ValueError(
            f"block must be a directory, tensors by name or a block with a gate, got {type(block).__name__}"
        )
    top_k = said if top_k is None else top_k
    if top_k is None:
        raise ValueError("top_k must be given with tensors, which do not say how many experts a token has")
    scoring = own_scoring if scoring is None else scoring
    if scoring is None:
        raise ValueError(
            f"scoring must be given with tensors of {family}, which do not say what norm_topk_prob is: "
            "jmoe.Scoring(renormalize=...)"
        )
    prefix = _prefix(tensors, layer)
    _check_names(tensors, prefix, MATRICES[family])
    router_weight = _array(tensors, f"{prefix}{ROUTER}", 2)
    top_k = as_count("top_k", top_k, router_weight.shape[0])
    count, hidden = router_weight.shape
    experts = _read_experts(tensors, f"{prefix}experts.", MATRICES[family], count, hidden, mxfp4)
    return HfBlock(experts, jnp.array(router_weight), top_k, scoring)


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a directory's safetensors files by name, each read when it is asked for; float32 as bfloat16."""

    def __init__(self, path: Path) -> None:
        """Reads the index, or the header of a single file. Raises FileNotFoundError if there is neither."""
        if (path / SINGLE).is_file():
            self.files = names_in(path / SINGLE)
        elif (path / INDEX).is_file():
            self.files = indexed_files(path)
        else:
            raise FileNotFoundError(f"{path} has neither {SINGLE} nor {INDEX}")

    def __getitem__(self, name: str) -> np.ndarray:
        with open_safetensors(self.files[name]) as shard:
            return read_tensor(self.files[name], shard, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _said_by_config(file: Path, family: str) -> tuple[int, Scoring]:
    """(experts a token, scoring)."""
    entries = read_json(file)
    wanted = {"model_type": family, "hidden_act": "silu"}
    for name, value in wanted.items():
        if entries.get(name, value) != value:
            raise ValueError(f"{file}: {name} must be {in_json(value)}, got {in_json(entries[name])}")
    # transformers' default of norm_topk_prob is false; Mixtral has no such entry and always divides.
    renormalize = family == "mixtral" or entries.get("norm_topk_prob", False)
    return entries.get("num_experts_per_tok", 8 if family == "qwen3_moe" else 2), Scoring(renormalize=renormalize)


def _prefix(names: Iterable[str], layer: int | None) -> str:
    """What stands before the names of one block's tensors."""
    found = [name.removesuffix(ROUTER) for name in names if re.search(rf"(^|\.){re.escape(ROUTER)}$", name)]
    if layer is not None:
        found = [prefix for prefix in found if re.search(rf"(^|\.)layers\.{layer}\.", prefix)]
    if len(found) != 1:
        where = "" if layer is None else f" in layer {layer}"
        hint = ": layer says which" if len(found) > 1 and layer is None else ""
        raise ValueError(f"there must be one tensor {ROUTER}{where}, got {len(found)}{hint}")
    return found[0]


def _check_names(names: Iterable[str], prefix: str, matrices: tuple[str, str, str]) -> None:
    """Raises ValueError if the block has a tensor that would be left out: another family's bias or shared experts."""
    known = rf"gate\.weight|experts\.(gate_up_proj|down_proj|\d+\.({'|'.join(matrices)})\.weight)"
    for name in names:
        if name.startswith(prefix) and not re.fullmatch(known, name.removeprefix(prefix)):
            raise ValueError(f"the block has a tensor that this family has not: {name}")


def _read_experts(
    tensors: Mapping[str, Any], prefix: str, names: tuple[str, str, str], count: int, hidden: int, mxfp4: bool
) -> Experts:
    fused = f"{prefix}gate_up_proj" in tensors
    if fused:
        gate_up, downs = (_array(tensors, f"{prefix}{name}_proj", 3) for name in ("gate_up", "down"))
        inner, dtype = downs.shape[2], downs.dtype
        _check_shape(f"{prefix}gate_up_proj", gate_up, (count, 2 * inner, hidden))
        _check_shape(f"{prefix}down_proj", downs, (count, hidden, inner))
    else:
        first = _array(tensors, f"{prefix}0.{names[0]}.weight", 2)
        inner, dtype = first.shape[0], first.dtype
    whole = _room(count, 2 * inner, hidden, dtype, mxfp4), _room(count, hidden, inner, dtype, mxfp4)
    for expert in range(count):
        if fused:
            gate, up, down = gate_up[expert, :inner], gate_up[expert, inner:], downs[expert]
        else:
            matrices = []
            for name, shape in zip(names, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
                matrices.append(_array(tensors, full := f"{prefix}{expert}.{name}.weight", 2))
                _check_shape(full, matrices[-1], shape)
            gate, up, down = matrices
        _put(whole[0], expert, slice(0, None, 2), gate)
        _put(whole[0], expert, slice(1, None, 2), up)
        _put(whole[1], expert, slice(None), down)
    as_jax = [jax.tree.map(jnp.asarray, each) for each in whole]
    return Experts(as_jax[0], None, as_jax[1], None)


def _room(count: int, n: int, k: int, dtype: np.dtype, mxfp4: bool) -> Mxfp4 | np.ndarray:
    """Room on the host for [E, N, K]."""
    if not mxfp4:
        return np.empty((count, n, k), dtype)
    if k % BLOCK:
        raise ValueError(f"inner sizes must be multiples of {BLOCK} for MXFP4, got {k}: mxfp4=False keeps the experts")
    groups = k // BLOCK
    blocks: Any = np.empty((count, n, groups, BLOCK // 2), np.uint8)
    scales: Any = np.empty((count, n, groups), np.uint8)
    return Mxfp4(blocks, scales)


_quantize = jax.jit(quantize)


def _put(whole: Any, expert: int, rows: slice, matrix: np.ndarray) -> None:
    """Writes a matrix into an expert's rows."""
    if isinstance(whole, Mxfp4):
        rounded = _quantize(matrix[None])
        for into, part in ((whole.blocks, rounded.blocks), (whole.scales, rounded.scales)):
            np.asarray(into)[expert, rows] = part[0]  # numpy's already: a view
    else:
        whole[expert, rows] = matrix


def _array(tensors: Mapping[str, Any], name: str, rank: int) -> np.ndarray:
    """A tensor on the host, as bfloat16 or float32."""
    if name not in tensors:
        raise ValueError(f"the block has no tensor {name}")
    tensor = tensors[name]
    if hasattr(tensor, "detach"):  # PyTorch's, whose bfloat16 numpy does not know
        tensor = jnp.from_dlpack(tensor.detach().cpu().contiguous())
    array = np.asarray(tensor)
    if array.dtype == np.float16:
        array = array.astype(BFLOAT16)
    if array.dtype not in DTYPES:
        raise ValueError(f"{name} must be {', float16 or '.join(DTYPES)}, got {array.dtype}")
    if array.ndim != rank:
        raise ValueError(f"{name} must have rank {rank}, got shape {array.shape}")
    return array


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
