"""Checkpoints in the forms that people bring: each gives the weights of the one that it was written from."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from jmoe import gpt_oss
from jmoe.bench.model.case import sizes
from jmoe.bench.model.loading import write_checkpoint
from jmoe.checkpoint import Checkpoint, embed
from jmoe.checkpoint.config_file import CheckpointWarning
from jmoe.checkpoint.layouts import grouped
from jmoe.cli import app
from jmoe.doctor import model as doctor
from jmoe.gpt_oss.new_adapter import new_adapter
from jmoe.text import load_tokenizer
from tests.checkpoints import (
    TINY,
    cast,
    dense,
    in_original_layout,
    original_config,
    renamed,
    retype,
    tensors_of,
    written,
    written_original,
)
from tests.commands.test_doctor import MACHINE
from tests.trees import tree_equal

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"


def arrays(directory: Path, **options: object) -> list[jax.Array]:
    """Every array of the model."""
    model = gpt_oss.load(directory, packed=False, progress=False, **options)
    return jax.tree.leaves([model.embedding[...], model.stack, model.norm[...], model.head[...]])


@pytest.fixture(scope="module")
def packed() -> list[jax.Array]:
    return arrays(TINY)


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> list[jax.Array]:
    """The dense form that jmoe has always read."""
    return arrays(written(tmp_path_factory.mktemp("dense"), dense(tensors_of(TINY))))


@pytest.mark.parametrize("files", [1, 3])
def test_the_original_layout_is_the_same_model(files: int, tmp_path: Path, packed: list[jax.Array]) -> None:
    directory = written_original(tmp_path / "original", files=files)
    assert tree_equal(arrays(directory), packed)
    ours, theirs = gpt_oss.Config.load(directory), gpt_oss.Config.load(TINY)
    ends = {"eos_token_id": 0, "pad_token_id": 0, "stop_tokens": (0,)}
    assert dataclasses.replace(ours, **ends) == dataclasses.replace(theirs, **ends)


def test_the_original_layout_may_be_dense(tmp_path: Path, in_bfloat16: list[jax.Array]) -> None:
    """As OpenAI's model is without MXFP4: [E, out, in], which is no swap there."""
    directory = written_original(tmp_path / "original")
    tensors = in_original_layout(dense(tensors_of(TINY), swapped=True))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")
    assert tree_equal(arrays(directory), in_bfloat16)


def test_the_original_layout_embeds_and_is_counted_and_merged(tmp_path: Path, in_bfloat16: list[jax.Array]) -> None:
    directory = written_original(tmp_path / "original")
    ids = np.array([3, 1, 3])
    assert np.array_equal(embed(Checkpoint(directory), ids), embed(Checkpoint(TINY), ids))
    ours, theirs = (doctor.examine_model(of, [], MACHINE, batch=2, context=48).resident for of in (directory, TINY))
    assert ours == theirs
    nothing = new_adapter(gpt_oss.Config.load(directory), rank=2, scale=1.0, targets=("q",), seed=0)
    gpt_oss.merge(directory, nothing, tmp_path / "merged", progress=False)
    assert tree_equal(arrays(tmp_path / "merged"), in_bfloat16)


def test_the_original_layouts_errors_have_its_own_names(tmp_path: Path) -> None:
    directory = written_original(tmp_path / "original")
    tensors = load_file(directory / "model.safetensors")
    tensors["block.1.attn.qkv.bias"] = tensors["block.1.attn.qkv.bias"][:-1]
    del tensors["block.0.mlp.gate.bias"]
    save_file(tensors, directory / "model.safetensors")
    message = "\n".join([
        f"{directory} does not match its config.json:",
        "  block.1.attn.qkv.bias: wanted BF16 (256,), got BF16 (255,)",
        "  block.0.mlp.gate.bias: wanted BF16 (4,), got no such tensor",
    ])  # fmt: skip
    with pytest.raises(ValueError, match="does not match its config") as raised:
        arrays(directory)
    assert sorted(str(raised.value).splitlines()) == sorted(message.splitlines())
    (directory / "config.json").write_text(json.dumps(original_config() | {"head_dim": "32"}))
    with pytest.raises(ValueError, match='head_dim must be a positive int, got "32"'):
        Checkpoint(directory)


def test_where_the_tokenizer_is_that_the_original_layout_lacks(tmp_path: Path) -> None:
    parent = Path(shutil.copytree(EXAMPLE, tmp_path / "gpt-oss"))
    directory = written_original(parent / "original", EXAMPLE)
    with pytest.raises(FileNotFoundError, match=f"has no tokenizer; give the directory that it lies in, {parent}, "):
        load_tokenizer(directory)
    run = CliRunner().invoke(app, ["generate", "--model", str(directory), "hello"])
    assert run.exit_code == 1
    assert "give the directory that it lies in" in str(run.exception)
    (parent / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="put the tokenizer's files of the same model"):
        load_tokenizer(directory)
    with pytest.raises(FileNotFoundError, match=re.escape(f"but {directory} holds a checkpoint in OpenAI's layout")):
        gpt_oss.load(parent, progress=False)


@pytest.mark.parametrize(("dtype", "said"), [(np.float32, "float32"), (np.float16, "float16")])
def test_wider_floats_are_rounded_to_bfloat16_which_is_said_once(dtype: type, said: str, tmp_path: Path) -> None:
    """Of all tensors: values between those of bfloat16 too, which go to the nearest, ties to even."""
    random = np.random.default_rng(0)
    tensors = {
        name: tensor.astype(np.float32) * random.uniform(0.5, 1, tensor.shape)
        for name, tensor in dense(tensors_of(TINY)).items()
    }
    tensors["model.norm.weight"][:4] = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-10, 2.0**-14]
    tensors = cast(tensors, dtype)
    directory = written(tmp_path / "wide", tensors)
    with pytest.warns(CheckpointWarning) as told:
        got = arrays(directory)
    assert [str(each.message) for each in told] == [f"{directory}: {said} weights are rounded to bfloat16"]
    want = arrays(written(tmp_path / "narrow", cast(tensors, ml_dtypes.bfloat16)))
    assert tree_equal(got, want)
    with pytest.warns(CheckpointWarning):
        assert embed(Checkpoint(directory), np.array([5])).dtype == ml_dtypes.bfloat16


def test_a_tensor_larger_than_a_chunk_is_rounded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jmoe.checkpoint.tensors.CHUNK", 100)
    tensors = tensors_of(TINY)
    directory = written(tmp_path, cast(tensors, np.float32))
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert np.array_equal(Checkpoint(directory).tensor(name), tensors[name])


def test_doctor_counts_what_is_held_and_not_what_is_stored(tmp_path: Path) -> None:
    wide = written(tmp_path / "wide", cast(dense(tensors_of(TINY)), np.float32) | {"extra": np.zeros(3, np.int64)})
    narrow = written(tmp_path / "narrow", dense(tensors_of(TINY)))
    with pytest.warns(CheckpointWarning, match="rounded to bfloat16"):
        held = doctor.examine_model(wide, [], MACHINE, batch=2, context=48).resident
    assert held == doctor.examine_model(narrow, [], MACHINE, batch=2, context=48).resident
    rounded = doctor.examine_model(narrow, [], MACHINE, batch=2, context=48, quantize="mxfp4").resident
    assert rounded == doctor.examine_model(TINY, [], MACHINE, batch=2, context=48).resident


@pytest.mark.parametrize("original", [False, True])
def test_scales_typed_as_what_they_are_keep_their_bytes(
    original: bool, tmp_path: Path, packed: list[jax.Array]
) -> None:
    directory = tmp_path / "model"
    written_original(directory) if original else shutil.copytree(TINY, directory)
    for file in directory.glob("*.safetensors"):
        retype(file, "scales", "F8_E8M0")
    assert tree_equal(arrays(directory), packed)


@pytest.mark.parametrize("suffix", ["", "_blocks"])
def test_dense_experts_may_be_swapped(suffix: str, tmp_path: Path, in_bfloat16: list[jax.Array]) -> None:
    directory = written(tmp_path, dense(tensors_of(TINY), swapped=True, suffix=suffix))
    with pytest.warns(CheckpointWarning, match=r"are \[experts, out, in\], the other way round than usual") as told:
        assert tree_equal(arrays(directory), in_bfloat16)
    assert len(told) == 1


@pytest.mark.parametrize(("hidden", "inner", "told_by"), [(64, 64, "gate_up"), (128, 64, "down")])
def test_a_square_projection_lies_as_the_other_does(hidden: int, inner: int, told_by: str, tmp_path: Path) -> None:
    config = dataclasses.replace(sizes()["tiny"], hidden_size=hidden, intermediate_size=inner)
    (tmp_path / "packed").mkdir()
    write_checkpoint(tmp_path / "packed", config)
    tensors = tensors_of(tmp_path / "packed")
    want = arrays(written(tmp_path / "dense", dense(tensors), tmp_path / "packed"))
    swapped = written(tmp_path / "swapped", dense(tensors, swapped=True), tmp_path / "packed")
    with pytest.warns(CheckpointWarning, match=f"as {told_by}'s shape") as told:
        assert tree_equal(arrays(swapped), want)
    assert len(told) == 1


def test_a_square_projection_beside_a_packed_one_is_said_to_be_a_guess(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    write_checkpoint(tmp_path / "packed", sizes()["tiny"])
    tensors = tensors_of(tmp_path / "packed")
    mixed = {n: t for n, t in dense(tensors).items() if "gate_up" not in n} | {
        name: tensor for name, tensor in tensors.items() if "gate_up" in name
    }
    with pytest.warns(CheckpointWarning, match=r"nothing tells whether the square .*down_proj is \[experts, in, out\]"):
        arrays(written(tmp_path / "mixed", mixed, tmp_path / "packed"))


def test_names_without_their_prefix_and_a_wrapped_router(tmp_path: Path, packed: list[jax.Array]) -> None:
    tensors = renamed(tensors_of(TINY), lambda name: name.removeprefix("model."))
    assert tree_equal(arrays(written(tmp_path / "bare", tensors)), packed)
    tensors = renamed(tensors_of(TINY), lambda name: name.replace("mlp.router.", "mlp.router.linear."))
    assert tree_equal(arrays(written(tmp_path / "wrapped", tensors)), packed)


@pytest.mark.parametrize("experts", [5, 20])
def test_any_number_of_experts(experts: int, tmp_path: Path) -> None:
    """As in models that were pruned."""
    tensors = {
        name: np.resize(tensor, (experts, *tensor.shape[1:])) if ".mlp." in name else tensor
        for name, tensor in tensors_of(TINY).items()
    }
    directory = written(tmp_path, tensors, num_local_experts=experts)
    model = gpt_oss.load(directory, packed=False, progress=False)
    assert model.stack.experts.gate_up.shape == (2, experts, 192, 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n: n.replace("experts.down_proj_bias", "experts.down_projs.0.bias"), "experts are stored one by one"),
        (lambda n: n.replace("down_proj_scales", "down_proj.absmax"), "tensors are those of bitsandbytes"),
        (lambda n: n.replace("q_proj.weight", "q_proj.weight_packed"), "of another format than MXFP4"),
        (lambda n: n.replace("q_proj.weight", "q_proj.lora_A.weight"), "tensors are an adapter's"),
        (lambda n: n.replace("lm_head", "head"), "it has no lm_head.weight"),
    ],
)
def test_what_other_programs_save_is_refused_by_name(change: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"does not match its config.json:\n(.*\n)+  .*{said}"):
        arrays(written(tmp_path, renamed(tensors_of(TINY), change)))


def test_a_mismatch_of_all_layers_is_one_line_a_kind(tmp_path: Path) -> None:
    directory = written(tmp_path, tensors_of(TINY), hidden_size=96)
    with pytest.raises(ValueError, match="does not match its config") as raised:
        arrays(directory)
    lines = str(raised.value).splitlines()
    wanted = "  model.layers.{0..1}.self_attn.q_proj.weight: wanted BF16 (128, 96), got BF16 (128, 64)"
    assert wanted in lines
    assert not any("layers.0." in line for line in lines)
    assert len(lines) == len(set(lines))


def test_layers_are_counted_in_runs() -> None:
    lines = [(f"model.layers.{layer}.norm", "wrong") for layer in (0, 1, 2, 5, 7, 8)] + [("model.norm", "gone")]
    assert grouped(lines) == ["model.layers.{0..2,5,7..8}.norm: wrong", "model.norm: gone"]
    assert grouped([("block.3.norm", "wrong")]) == ["block.3.norm: wrong"]


def test_experts_are_counted_in_runs() -> None:
    names = ("experts.{}.gate_up_proj.lora_A", "experts.down_projs.{}.lora_A")
    lines = [
        (f"layers.{layer}.mlp.{name.format(e)}", "wrong") for layer in range(2) for name in names for e in (0, 1, 3)
    ]
    assert grouped(lines) == [
        "layers.{0..1}.mlp.experts.{0..1,3}.gate_up_proj.lora_A: wrong",
        "layers.{0..1}.mlp.experts.down_projs.{0..1,3}.lora_A: wrong",
    ]


def test_layers_that_config_json_does_not_count(tmp_path: Path) -> None:
    directory = written(tmp_path / "many", tensors_of(TINY), num_hidden_layers=9999, layer_types=None)
    with pytest.raises(ValueError, match=r"has tensors of 2 layers, and num_hidden_layers in its config.json is 9999"):
        arrays(directory)
    directory = written(tmp_path / "few", tensors_of(TINY), num_hidden_layers=1, layer_types=None)
    with pytest.warns(CheckpointWarning, match="layers from 1 on are not used"):
        arrays(directory)
