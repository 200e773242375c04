"""Checkpoints: what is read of a directory, against stored reference values, and each way in which one can be wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jmoe.checkpoint import Checkpoint, embed, load_moe_layer, router_logits
from jmoe.checkpoint import directory as reading
from jmoe.checkpoint.config_file import Config
from jmoe.ops.mxfp4 import Mxfp4, dequantize
from jmoe.ops.norm import rms_norm
from tests.trees import tree_equal

CASE = Path(__file__).parents[1] / "data" / "tiny_case"
SHARDS = [f"model-{i:05d}-of-00002.safetensors" for i in range(3)]
INDEX = "model.safetensors.index.json"
LAYER_0 = [
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.mlp.router.weight",
    "model.layers.0.mlp.router.bias",
    "model.layers.0.mlp.experts.gate_up_proj_blocks",
    "model.layers.0.mlp.experts.gate_up_proj_scales",
    "model.layers.0.mlp.experts.gate_up_proj_bias",
    "model.layers.0.mlp.experts.down_proj_blocks",
    "model.layers.0.mlp.experts.down_proj_scales",
    "model.layers.0.mlp.experts.down_proj_bias",
]


@pytest.fixture
def directory(tmp_path):
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(CASE / "model", tmp_path / "model"))


@pytest.fixture(scope="module")
def expected():
    with np.load(CASE / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def reads(monkeypatch):
    """What is read while a test runs: file names opened, tensors read whole, rows read of a table."""
    log = {"files": set(), "tensors": [], "rows": []}
    real = reading.safe_open

    class Rows:
        def __init__(self, table):
            self.table, self.get_shape, self.get_dtype = table, table.get_shape, table.get_dtype

        def __getitem__(self, window):
            log["rows"].append((window.start, window.stop))
            return self.table[window]

    class Recorder:
        def __init__(self, file, framework):
            log["files"].add(Path(file).name)
            self.shard = real(file, framework=framework)
            self.keys = self.shard.keys

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def get_tensor(self, name):
            log["tensors"].append(name)
            return self.shard.get_tensor(name)

        def get_slice(self, name):
            return Rows(self.shard.get_slice(name))

    monkeypatch.setattr(reading, "safe_open", Recorder)
    return log


def edit_json(file, **entries):
    """Sets entries of a JSON file; those set to None are removed."""
    value = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))


def edit_shard(file, **tensors):
    """Replaces tensors of a shard; those set to None are removed."""
    value = load_file(file) | tensors
    save_file({name: tensor for name, tensor in value.items() if tensor is not None}, file)


def merge_shards(directory):
    """Turns the sharded checkpoint into a single file without an index."""
    tensors = {name: tensor for shard in SHARDS for name, tensor in load_file(directory / shard).items()}
    for file in (*SHARDS, INDEX):
        (directory / file).unlink()
    save_file(tensors, directory / "model.safetensors")


def same_bits(got, want):
    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def test_config_holds_the_fields_of_the_file():
    assert Config.load(CASE / "model") == Config(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=128,
        rms_norm_eps=1e-5,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
    )


def test_config_accepts_experts_per_token_and_other_activations(directory):
    edit_json(
        directory / "config.json", num_experts_per_tok=None, experts_per_token=3, swiglu_alpha=1.5, swiglu_limit=None
    )
    config = Config.load(directory)
    assert (config.num_experts_per_tok, config.swiglu_alpha, config.swiglu_limit) == (3, 1.5, 7.0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'gpt_oss', got 'llama'"),
        ({"hidden_size": None, "vocab_size": None}, "hidden_size is missing; vocab_size is missing"),
        (
            {"hidden_size": "64", "rms_norm_eps": True, "vocab_size": 0},
            'hidden_size must be a positive int, got "64"; vocab_size must be a positive int, got 0; '
            "rms_norm_eps must be a positive float, got true",
        ),
        ({"swiglu_limit": float("nan")}, "swiglu_limit must be a positive float, got NaN"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most num_local_experts = 4, got 5"),
    ],
)
def test_config_errors(directory, entries, message):
    file = directory / "config.json"
    edit_json(file, **entries)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{file}: {message}')}$"):
        Config.load(directory)


def test_json_errors(directory):
    file = directory / "config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=re.escape(f"{file} is not valid JSON: ")):
        Config.load(directory)
    file.write_text("[1]")
    with pytest.raises(ValueError, match=re.escape(f"{file} must hold a JSON object, got list")):
        Config.load(directory)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{file} does not exist")):
        Config.load(directory)


def test_dequantised_weights_have_the_bits_transformers_computes(expected):
    experts = load_moe_layer(Checkpoint(CASE / "model"), 0).experts
    for name in ("gate_up", "down"):
        packed = getattr(experts, name)
        assert isinstance(packed, Mxfp4)
        want = expected[f"dequant/model.layers.0.mlp.experts.{name}_proj"]  # [E, in, out]
        assert same_bits(np.asarray(dequantize(packed, jnp.float32)).swapaxes(1, 2), want)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("single", [False, True], ids=["sharded", "single"])
def test_layer_holds_the_bytes_of_the_file(directory, layer, single):
    tensors = {name: tensor for shard in SHARDS for name, tensor in load_file(directory / shard).items()}
    if single:
        merge_shards(directory)
    got = load_moe_layer(Checkpoint(directory), layer)
    prefix = f"model.layers.{layer}."
    want = {
        f"{prefix}post_attention_layernorm.weight": got.norm_weight,
        f"{prefix}mlp.router.weight": got.router_weight,
        f"{prefix}mlp.router.bias": got.router_bias,
        f"{prefix}mlp.experts.gate_up_proj_blocks": got.experts.gate_up.blocks,
        f"{prefix}mlp.experts.gate_up_proj_scales": got.experts.gate_up.scales,
        f"{prefix}mlp.experts.gate_up_proj_bias": got.experts.gate_up_bias,
        f"{prefix}mlp.experts.down_proj_blocks": got.experts.down.blocks,
        f"{prefix}mlp.experts.down_proj_scales": got.experts.down.scales,
        f"{prefix}mlp.experts.down_proj_bias": got.experts.down_bias,
    }
    assert [name for name, array in want.items() if not same_bits(array, tensors[name])] == []
    assert got.config == Config.load(directory)
    assert len(jax.tree.leaves(got)) == len(want)


def test_a_layer_that_stays_on_the_host_is_numpys(directory):
    got = load_moe_layer(Checkpoint(directory), 0, on_host=True)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(got))
    assert tree_equal(jax.tree.map(jnp.asarray, got), load_moe_layer(Checkpoint(directory), 0))


def test_layer_reads_its_own_tensors_once_and_opens_no_other_shard(directory, reads):
    checkpoint = Checkpoint(directory)
    assert reads["files"] == set()
    load_moe_layer(checkpoint, 0)
    assert sorted(reads["tensors"]) == sorted(LAYER_0)
    assert reads["files"] == set(SHARDS[:2])


def test_layer_loads_while_other_shards_are_absent_or_corrupt(directory):
    before = load_moe_layer(Checkpoint(directory), 0)
    (directory / SHARDS[2]).write_bytes(b"not a tensor")
    assert tree_equal(load_moe_layer(Checkpoint(directory), 0), before)
    (directory / SHARDS[2]).unlink()
    assert tree_equal(load_moe_layer(Checkpoint(directory), 0), before)


def test_shards_may_be_links_out_of_the_directory(directory, tmp_path):
    before = load_moe_layer(Checkpoint(directory), 1)
    for shard in SHARDS:
        (directory / shard).rename(tmp_path / shard)
        (directory / shard).symlink_to(tmp_path / shard)
    assert tree_equal(load_moe_layer(Checkpoint(directory), 1), before)


@pytest.mark.parametrize("layer", [-1, 2])
def test_layer_out_of_range(layer):
    checkpoint = Checkpoint(CASE / "model")
    with pytest.raises(ValueError, match=re.escape(f"layer must be in [0, 2) for {checkpoint.path}, got {layer}")):
        load_moe_layer(checkpoint, layer)


def test_every_mismatch_is_listed(directory):
    layer = "model.layers.0."
    edit_json(directory / "config.json", intermediate_size=64)
    edit_shard(
        directory / SHARDS[0],
        **{
            f"{layer}mlp.router.bias": np.zeros(4, np.float64),
            f"{layer}mlp.router.weight": np.zeros((4, 63), ml_dtypes.bfloat16),
        },
    )
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"][f"{layer}mlp.experts.down_proj_scales"]
    (directory / INDEX).write_text(json.dumps(index))
    message = [
        f"{directory} does not match its config.json:",
        f"  {layer}mlp.router.weight: wanted BF16 (4, 64), got BF16 (4, 63)",
        f"  {layer}mlp.router.bias: wanted BF16 (4,), got F64 (4,)",
        f"  {layer}mlp.experts.gate_up_proj_bias: wanted BF16 (4, 128), got BF16 (4, 192)",
        f"  {layer}mlp.experts.gate_up_proj_blocks: wanted U8 (4, 128, 2, 16), got U8 (4, 192, 2, 16)",
        f"  {layer}mlp.experts.gate_up_proj_scales: wanted U8 (4, 128, 2), got U8 (4, 192, 2)",
        f"  {layer}mlp.experts.down_proj_blocks: wanted U8 (4, 64, 2, 16), got U8 (4, 64, 3, 16)",
        f"  {layer}mlp.experts.down_proj_scales: wanted U8 (4, 64, 2), got no such tensor",
    ]
    with pytest.raises(ValueError, match=f"^{re.escape(chr(10).join(message))}$"):
        load_moe_layer(Checkpoint(directory), 0)


def test_packed_decode_need_whole_blocks(directory):
    edit_json(directory / "config.json", intermediate_size=100)
    message = "model.layers.0.mlp.experts.down_proj_blocks packs blocks of 32 values, so its input size cannot be 100"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_moe_layer(Checkpoint(directory), 0)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/elsewhere/model.safetensors", "shards/model.safetensors", "..", "", 3]
)
def test_index_stays_in_its_directory(directory, file):
    edit_json(directory / INDEX, weight_map={"a": file})
    message = f"{directory / INDEX}: a must be in a file of the checkpoint's own directory, got {json.dumps(file)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Checkpoint(directory)


def test_missing_entry_points(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"checkpoint directory {tmp_path / 'none'} does not exist")):
        Checkpoint(tmp_path / "none")
    edit_json(directory / INDEX, weight_map=None)
    with pytest.raises(ValueError, match=re.escape(f"{directory / INDEX}: weight_map must be a JSON object, got null")):
        Checkpoint(directory)
    (directory / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{directory} has neither model.safetensors nor {INDEX}")):
        Checkpoint(directory)


def test_shard_errors(directory):
    name = "model.norm.weight"
    shard = directory / SHARDS[2]
    checkpoint = Checkpoint(directory)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{directory} has no tensor lm_head.bias')}$"):
        checkpoint.tensor("lm_head.bias")
    edit_shard(shard, **{name: None})
    with pytest.raises(ValueError, match=re.escape(f"{shard} has no tensor {name}, though {INDEX} places it there")):
        checkpoint.tensor(name)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=re.escape(f"{shard} is not a whole safetensors file: ")):
        checkpoint.tensor(name)
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"{shard} does not exist, though {INDEX} places {name} there")
    ):
        checkpoint.tensor(name)


def test_embed_gives_the_rows_transformers_takes(expected, reads):
    tokens = expected["input_ids"].ravel()
    got = embed(Checkpoint(CASE / "model"), tokens)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), expected["base_hidden/0"].reshape(-1, 64))
    assert reads["rows"] == [(i, i + 1) for i in sorted(set(tokens.tolist()))]
    assert reads["tensors"] == []
    assert reads["files"] == {SHARDS[2]}


def test_embed_of_no_tokens():
    assert embed(Checkpoint(CASE / "model"), np.zeros(0, np.int32)).shape == (0, 64)


def test_embed_errors(directory):
    checkpoint = Checkpoint(directory)
    name = "model.embed_tokens.weight"
    message = f"{directory / SHARDS[2]}: row ids of {name} must be in [0, 128), got "
    for ids, seen in (([0, 128], "0 to 128"), ([-1, 3], "-1 to 3")):
        with pytest.raises(ValueError, match=f"^{re.escape(message + seen)}$"):
            embed(checkpoint, np.array(ids))
    with pytest.raises(ValueError, match=f"^row ids of {name} must be integers, got float64$"):
        embed(checkpoint, np.array([1.0]))
    edit_json(directory / "config.json", vocab_size=127)
    with pytest.raises(ValueError, match=re.escape(f"{name}: wanted BF16 (127, 64), got BF16 (128, 64)")):
        embed(Checkpoint(directory), np.array([1]))


def test_rms_norm_rounds_once_after_the_weight():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 96)), jnp.bfloat16)
    weight = jnp.asarray(rng.uniform(0.5, 2, 96), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    normal = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    want = (normal * np.asarray(weight, np.float64)).astype(np.float32).astype(ml_dtypes.bfloat16)
    got = np.asarray(rms_norm(x, weight, 1e-5))
    assert got.dtype == ml_dtypes.bfloat16
    # float32 sums put a few values on the other side of a boundary; rounding before the product moves a quarter.
    assert np.mean(got == want) > 0.999


def test_router_logits_round_once():
    layer = load_moe_layer(Checkpoint(CASE / "model"), 0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 200, 64)), jnp.bfloat16)
    weight, bias = np.asarray(layer.router_weight, np.float64), np.asarray(layer.router_bias, np.float64)
    want = (np.asarray(x, np.float64) @ weight.T + bias).astype(np.float32).astype(ml_dtypes.bfloat16)
    got = np.asarray(jax.jit(router_logits)(layer, x))
    assert got.dtype == ml_dtypes.bfloat16
    assert np.mean(got == want) > 0.995


def test_import_leaves_torch_and_the_kernels_alone():
    program = (
        "import sys, jmoe.checkpoint, jmoe.adapters; print(sorted({'torch', 'triton', 'jax_triton'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
