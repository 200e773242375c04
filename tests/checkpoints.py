"""A checkpoint's tensors written again in the other forms that people bring."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from jmoe.ops.mxfp4 import Mxfp4, dequantize

TINY = Path(__file__).parent / "data" / "tiny_case" / "model"
"""A checkpoint in MXFP4."""

type Tensors = dict[str, np.ndarray]


def tensors_of(directory: Path) -> Tensors:
    """All tensors of a checkpoint."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def written(folder: Path, tensors: Mapping[str, np.ndarray], source: Path = TINY, **entries: Any) -> Path:
    """A directory with these tensors in one file, and the source's config.json and text files; None drops an entry."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("tokenizer*", "chat_template*", "generation_config.json"):
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": None} | entries
    (folder / "config.json").write_text(json.dumps({name: v for name, v in config.items() if v is not None}))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def dense(tensors: Tensors, *, swapped: bool = False, suffix: str = "") -> Tensors:
    """Experts in bfloat16, [E, in, out] or else [E, out, in], under their name and this suffix."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            weight = np.asarray(dequantize(Mxfp4(tensor, tensors[f"{name.removesuffix('_blocks')}_scales"])))
            result[name.removesuffix("_blocks") + suffix] = weight if swapped else weight.swapaxes(1, 2)
        elif not name.endswith("_scales"):
            result[name] = tensor
    return result


def cast(tensors: Tensors, dtype: type) -> Tensors:
    """Floating-point tensors in another dtype."""
    return {name: tensor if tensor.dtype == np.uint8 else tensor.astype(dtype) for name, tensor in tensors.items()}


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    """Under other names."""
    return {change(name): tensor for name, tensor in tensors.items()}


def in_original_layout(tensors: Tensors) -> Tensors:
    """As OpenAI's own files have them."""
    whole = {"model.embed_tokens": "embedding", "model.norm.weight": "norm.scale", "lm_head": "unembedding"}
    parts = {
        "model.layers.": "block.",
        "input_layernorm.weight": "attn.norm.scale",
        "post_attention_layernorm.weight": "mlp.norm.scale",
        "self_attn.o_proj": "attn.out",
        "self_attn.sinks": "attn.sinks",
        "mlp.router": "mlp.gate",
        "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
        "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
        "mlp.experts.gate_up_proj": "mlp.mlp1_weight",
        "mlp.experts.down_proj": "mlp.mlp2_weight",
        "_blocks": ".blocks",
        "_scales": ".scales",
    }

    def change(name: str) -> str:
        for old, new in (whole | parts).items():
            name = name.replace(old, new)
        return name

    result = {}
    for name, tensor in tensors.items():
        if "self_attn.q_proj" in name:
            three = [tensors[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            result[change(name).replace("self_attn.q_proj", "attn.qkv")] = np.concatenate(three)
        elif not any(f"self_attn.{each}_proj" in name for each in "kv"):
            result[change(name)] = tensor
    return result


def original_config(source: Path = TINY) -> dict[str, Any]:
    """config.json as OpenAI writes it."""
    entries = json.loads((source / "config.json").read_text())
    rope = entries.get("rope_scaling") or entries["rope_parameters"]
    same = (
        "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "swiglu_limit", "head_dim",
        "num_attention_heads", "num_key_value_heads", "sliding_window",
    )  # fmt: skip
    return {name: entries[name] for name in same} | {
        "num_experts": entries["num_local_experts"],
        "experts_per_token": entries["num_experts_per_tok"],
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_theta": entries.get("rope_theta") or rope["rope_theta"],
        "rope_scaling_factor": rope["factor"],
        "rope_ntk_alpha": rope["beta_slow"],
        "rope_ntk_beta": rope["beta_fast"],
    }


def written_original(folder: Path, source: Path = TINY, *, files: int = 1) -> Path:
    """The source in OpenAI's layout, in one file or in several without an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(original_config(source)))
    (folder / "dtypes.json").write_text("{}")
    tensors = {name: np.ascontiguousarray(t) for name, t in in_original_layout(tensors_of(source)).items()}
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    for i in range(files):
        part = dict(list(tensors.items())[i::files])
        save_file(part, folder / f"model--{i + 1:05}-of-{files:05}.safetensors")
    return folder


def retype(file: Path, suffix: str, dtype: str) -> None:
    """Gives tensors whose names end so another dtype of the same size, their bytes as they are."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        if name.endswith(suffix):
            entry["dtype"] = dtype
    fresh = json.dumps(header).encode()
    fresh += b" " * (-len(fresh) % 8)
    file.write_bytes(len(fresh).to_bytes(8, "little") + fresh + content[8 + length :])
