"""Dense experts rounded to MXFP4 while they are loaded: the bits of jmoe.quantize, and never a layer at once."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

import jmoe
from jmoe import gpt_oss
from jmoe.checkpoint import Checkpoint
from jmoe.cli import app
from jmoe.gpt_oss import stack
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4
from jmoe.ops.packed import unpack_weight
from tests.checkpoints import TINY, cast, dense, tensors_of, written
from tests.trees import tree_equal

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"


def layers(directory: Path, **options: object) -> gpt_oss.LayerWeights:
    return gpt_oss.load(directory, quantize="mxfp4", progress=False, **options).stack


def random_experts(dtype: type, swapped: bool = False) -> dict[str, np.ndarray]:
    """The tiny case with dense experts whose values MXFP4 has not."""
    tensors = dense(tensors_of(TINY), swapped=swapped)
    for name, tensor in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            shape = np.swapaxes(tensor, 1, 2).shape if swapped else tensor.shape
            weight = np.random.default_rng(len(name) + int("gate" in name)).normal(size=shape).astype(dtype)
            tensors[name] = weight.swapaxes(1, 2) if swapped else weight
    return tensors


@pytest.mark.filterwarnings("ignore::jmoe.checkpoint.config_file.CheckpointWarning")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float16])
def test_experts_are_those_of_quantize(packed: bool, swapped: bool, dtype: type, tmp_path: Path) -> None:
    """Rounded once, from the file's own dtype: a float32 weight does not go through bfloat16."""
    tensors = random_experts(dtype, swapped)
    experts = layers(written(tmp_path, tensors), packed=packed).experts
    for projection in ("gate_up", "down"):
        stacked = getattr(experts, projection)
        assert isinstance(stacked, PackedMxfp4 if packed else Mxfp4)
        for layer in range(2):
            weight = tensors[f"model.layers.{layer}.mlp.experts.{projection}_proj"]
            want = jmoe.quantize(jnp.asarray(weight if swapped else weight.swapaxes(1, 2)))
            got = jax.tree.map(lambda leaf: leaf[layer], stacked)  # noqa: B023
            assert tree_equal(unpack_weight(got) if packed else got, want)


def test_what_mxfp4_has_is_kept_and_what_is_mxfp4_is_left(tmp_path: Path) -> None:
    plain = gpt_oss.load(TINY, packed=False, progress=False).stack
    assert tree_equal(layers(TINY, packed=False), plain)
    of_dense = layers(written(tmp_path, dense(tensors_of(TINY))), packed=False).experts.down
    for layer in range(2):  # the bytes may be others, as a zero block has any scale
        got, want = (jax.tree.map(lambda leaf: leaf[layer], of) for of in (of_dense, plain.experts.down))  # noqa: B023
        assert jnp.array_equal(jmoe.dequantize(got), jmoe.dequantize(want))


def test_a_checkpoint_that_is_dense_in_part(tmp_path: Path) -> None:
    tensors = tensors_of(TINY)
    mixed = {name: tensor for name, tensor in dense(tensors).items() if ".0." in name or "layers" not in name}
    mixed |= {name: tensor for name, tensor in tensors.items() if ".1." in name}
    directory = written(tmp_path, mixed)
    with pytest.raises(ValueError, match=r'in MXFP4 and dense ones \(model.layers.0.*, which quantize="mxfp4"'):
        gpt_oss.load(directory, progress=False)
    assert layers(directory, packed=True).experts.gate_up.shape == (2, 4, 192, 64)


def test_every_device_of_a_mesh_has_them(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    directory = written(tmp_path, random_experts(ml_dtypes.bfloat16))
    on_mesh, alone = layers(directory, mesh=mesh, packed=True), layers(directory, packed=True)
    assert len(on_mesh.experts.down.words.sharding.device_set) == 2
    assert tree_equal(jax.device_get(on_mesh), jax.device_get(alone))


def test_neither_host_nor_device_has_two_experts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, rounded = [], []
    real_expert, real_round = Checkpoint.expert, stack.round_expert

    def expert(self: Checkpoint, name: str, index: int) -> np.ndarray:
        read.append((name, index))
        return real_expert(self, name, index)

    def round_expert(weight: np.ndarray, **options: object) -> Mxfp4:
        rounded.append(weight.ndim)
        assert len(rounded) == len(read)
        return real_round(weight, **options)

    def tensor(self: Checkpoint, name: str, *, real: object = Checkpoint.tensor) -> np.ndarray:
        assert not name.endswith(("gate_up_proj", "down_proj"))
        return real(self, name)

    monkeypatch.setattr(Checkpoint, "expert", expert)
    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    monkeypatch.setattr(stack, "round_expert", round_expert)
    layers(written(tmp_path, dense(tensors_of(TINY))))
    assert len(read) == len(set(read)) == 2 * 2 * 4
    assert set(rounded) == {2}


def test_blocks_must_be_whole(tmp_path: Path) -> None:
    tensors = {
        name: tensor[:, :80] if name.endswith("down_proj") else tensor[..., :160] if "gate_up" in name else tensor
        for name, tensor in dense(tensors_of(TINY)).items()
    }
    directory = written(tmp_path, tensors, intermediate_size=80)
    assert gpt_oss.load(directory, progress=False).config.intermediate_size == 80
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj cannot be MXFP4.*: its input size is 80"):
        layers(directory)


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="quantize must be \"mxfp4\" or None, got 'nf4'"):
        gpt_oss.load(TINY, quantize="nf4", progress=False)


@pytest.mark.parametrize("command", ["generate", "finetune", "eval"])
def test_the_commands_load_so(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*_: object, **options: object) -> None:
        asked.append(options["quantize"])
        raise ValueError("enough")

    monkeypatch.setattr("jmoe.finetune.run.load", load)
    monkeypatch.setattr("jmoe.gpt_oss.load", load)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "the work and such"}) + "\n")
    out = ["--out", str(tmp_path / "out")]
    flags = {
        "generate": ["hello"],
        "finetune": [*out, "--data", str(data), "--validation-fraction", "0"],
        "eval": [*out, "--tasks", "even", "--include-path", str(EXAMPLE.parent / "even")],
    }
    run = CliRunner().invoke(app, [command, "--model", str(EXAMPLE), "--quantize", "mxfp4", *flags[command]])
    assert str(run.exception) == "enough", run.output
    assert asked == ["mxfp4"]
    run = CliRunner().invoke(app, [command, "--model", str(EXAMPLE), "--quantize", "int8", *flags[command]])
    assert run.exit_code != 0
    assert "mxfp4" in f"{run.output} {run.exception}"


@pytest.mark.filterwarnings("ignore::jmoe.checkpoint.config_file.CheckpointWarning")
def test_doctor_counts_experts_as_rounded(tmp_path: Path) -> None:
    directory = written(tmp_path, cast(dense(tensors_of(EXAMPLE)), np.float32), EXAMPLE)
    weights = []
    for flags, said in (([], "experts, bf16"), (["--quantize", "mxfp4"], "experts, packed 4-bit")):
        run = CliRunner().invoke(app, ["doctor", "--model", str(directory), *flags])
        assert run.exit_code == 0, run.output
        assert said in run.stdout
        (of_finetuning,) = (line.split()[1:3] for line in run.stdout.splitlines() if line.split()[:1] == ["nothing"])
        weights.append(float(of_finetuning[0]))
    assert weights[1] < weights[0] / 2
