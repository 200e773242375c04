"""Loading: what is held meanwhile, and errors that name the file and the tensor."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from jmoe import gpt_oss
from jmoe.gpt_oss.load import FILES
from jmoe.gpt_oss.stack import put
from jmoe.ops.mxfp4 import PackedMxfp4, quantize
from jmoe.ops.packed import empty_packed, pack_into, pack_weight

CASE = Path(__file__).parents[1] / "data" / "tiny_case" / "model"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CASE, tmp_path / "model"))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def change(folder: Path, name: str, tensor: np.ndarray | None) -> None:
    """Replaces a tensor, or removes it."""
    file = shard_of(folder, name)
    tensors = load_file(file)
    tensors.pop(name) if tensor is None else tensors.update({name: tensor})
    save_file(tensors, file)


def test_experts_stay_in_four_bits() -> None:
    model = gpt_oss.load(CASE, packed=True, progress=False)
    experts = model.stack.experts
    assert isinstance(experts.gate_up, PackedMxfp4)
    assert experts.gate_up.words.shape[:2] == (2, 4)
    plain = gpt_oss.load(CASE, packed=False, progress=False).stack.experts
    assert plain.down.blocks.dtype == np.uint8


def test_a_layer_is_put_into_the_stacks_own_memory() -> None:
    leaf = jax.numpy.ones((3, 5))
    stack = jax.numpy.zeros((4, 3, 5))
    before = stack.unsafe_buffer_pointer()
    after = put(stack, leaf, 2)
    assert after.unsafe_buffer_pointer() == before
    assert after.sum(axis=(1, 2)).tolist() == [0, 0, 15, 0]


def test_experts_are_packed_into_the_stacks_own_memory() -> None:
    weight = quantize(jax.random.normal(jax.random.key(0), (3, 70, 96)))
    stack = empty_packed(2, 3, n=70, k=96)
    before = stack.words.unsafe_buffer_pointer()
    after = pack_into(stack, weight, 1)
    assert after.words.unsafe_buffer_pointer() == before
    assert not after.words[0].any()
    wanted = pack_weight(weight)
    assert jax.numpy.array_equal(after.words[1], wanted.words)
    assert jax.numpy.array_equal(after.scales[1], wanted.scales)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    change(copy, "model.layers.1.self_attn.sinks", None)
    with pytest.raises(ValueError, match=r"safetensors has no tensor model.layers.1.self_attn.sinks, though"):
        gpt_oss.load(copy, progress=False)


def test_a_tensor_of_another_shape_is_named(copy: Path) -> None:
    change(copy, "model.layers.0.self_attn.q_proj.weight", np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"0.self_attn.q_proj.weight: wanted BF16 \(128, 64\), got F32 \(3, 4\)"):
        gpt_oss.load(copy, progress=False)
    shutil.rmtree(copy)
    shutil.copytree(CASE, copy)
    change(copy, "model.layers.1.mlp.experts.down_proj_scales", np.zeros((4, 64, 2), np.uint8))
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj_scales: wanted U8"):
        gpt_oss.load(copy, progress=False)


def test_a_truncated_file_is_named(copy: Path) -> None:
    file = shard_of(copy, "lm_head.weight")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file.name} is not a whole safetensors file"):
        gpt_oss.load(copy, progress=False)


def test_a_missing_shard_is_named(copy: Path) -> None:
    file = shard_of(copy, "lm_head.weight")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file.name} does not exist, though"):
        gpt_oss.load(copy, progress=False)


def test_an_index_that_points_outside_is_refused(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"lm_head.weight must be in a file of the checkpoint's own directory"):
        gpt_oss.load(copy, progress=False)


def test_neither_a_directory_nor_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=f"checkpoint directory {tmp_path}/none does not exist"):
        gpt_oss.load(tmp_path / "none", progress=False)
    with pytest.raises(FileNotFoundError, match=r"original is not a directory; of the Hub give openai/gpt-oss-20b$"):
        gpt_oss.load("openai/gpt-oss-20b/original", progress=False)

    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no network\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"openai/gpt-oss-20b is not a directory, and could not be fetched .*: no net"
    ):
        gpt_oss.load("openai/gpt-oss-20b", progress=False)


def test_a_repository_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        return str(CASE)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert gpt_oss.load("someone/tiny", progress=False).config.hidden_size == 64
    assert asked == ["someone/tiny"]


def test_weights_are_fetched_once() -> None:
    files = ["model-00000-of-00002.safetensors", "original/model.safetensors", "metal/model.bin", "tokenizer.json"]
    assert list(filter_repo_objects(files, allow_patterns=list(FILES))) == [files[0], files[3]]
