"""`jmoe doctor`, here and on machines that are not here."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jmoe import gpt_oss
from jmoe.checkpoint.tensors import Spec
from jmoe.cli import app
from jmoe.device_memory import FRACTION, NAMES, byte_size
from jmoe.device_mesh import planned_mesh
from jmoe.doctor import machine as here
from jmoe.doctor import model as doctor
from jmoe.finetune import memory
from jmoe.finetune.config import FinetuneConfig
from jmoe.gpt_oss import flash_attention
from jmoe.gpt_oss.cache import cache_bytes

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
MACHINE = here.Machine({}, (), gpu=False, no_triton="JAX sees no GPU", tiles=None, no_flash="no Hopper", missing=())


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_the_machine_and_a_model_are_described() -> None:
    run = CliRunner().invoke(app, ["doctor", "--model", str(TINY), "--adapter", str(TINY / "adapter")])
    assert run.exit_code == 0, run.output
    assert "does not run: JAX sees no GPU" in run.stdout
    assert "attention to the last 32 tokens" in run.stdout
    assert "KV cache of 16 x 1024 tokens" in run.stdout
    assert "that JAX may take" not in run.stdout  # of a CPU's memory it does not say


def test_bytes_are_those_of_the_files() -> None:
    report = doctor.examine_model(TINY, [TINY / "adapter"], MACHINE, batch=2, context=48)
    shards = [file.read_bytes() for file in TINY.glob("*.safetensors")]
    data = sum(len(shard) - 8 - int.from_bytes(shard[:8], "little") for shard in shards)
    weights = ("embedding and head", "experts, packed 4-bit", "other weights")
    assert sum(report.resident[kind] for kind in weights) == data
    assert report.resident["embedding and head"] == 2 * 2 * 512 * 128
    cache = cache_bytes(gpt_oss.Config.load(TINY), 2, 48)
    assert report.resident["KV cache of 2 x 48 tokens"] == cache == 2 * 2 * 2 * 2 * 32 * (32 + 48)
    assert report.resident["adapters"] > 0


@pytest.mark.parametrize(
    ("text", "experts", "heads", "batch"),
    [("data=2,expert=2", 2, 1, 4), ("data=4,model=2", 2, 2, 4), ("heads=2", 1, 2, 1)],
)
def test_on_a_mesh_it_is_the_bytes_of_each_device(text: str, experts: int, heads: int, batch: int) -> None:
    size = {"batch": 16, "context": 48}
    whole = doctor.examine_model(TINY, [], MACHINE, **size).resident
    report = doctor.examine_model(TINY, [], MACHINE, mesh=planned_mesh(text), **size)
    kinds = ("experts, packed 4-bit", "embedding and head", "KV cache of 16 x 48 tokens")
    assert [whole[kind] // report.resident[kind] for kind in kinds] == [experts, 1, heads * batch]
    assert report.devices == planned_mesh(text).size


def test_a_mesh_of_devices_that_are_not_here_is_told() -> None:
    run = CliRunner().invoke(app, ["doctor", "--model", str(TINY), "--mesh", "data=4,expert=2"])
    assert run.exit_code == 0, run.output
    assert "memory of each of 8 devices" in run.stdout
    run = CliRunner().invoke(app, ["doctor", "--model", str(TINY), "--mesh", "expert=3"])
    assert "8 experts cannot be split evenly over expert = 3 devices" in str(run.exception)


def test_a_checkpoint_or_adapter_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    model = shutil.copytree(TINY, tmp_path / "model")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    lost = "model.layers.1.mlp.experts.down_proj_bias"
    del index["weight_map"][lost]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    run = CliRunner().invoke(app, ["doctor", "--model", str(model)])
    assert run.exit_code != 0
    assert lost in f"{run.output} {run.exception}"
    other = Path(__file__).parents[1] / "data" / "tiny_case" / "adapter"
    run = CliRunner().invoke(app, ["doctor", "--model", str(TINY), "--adapter", str(other)])
    assert run.exit_code != 0


def test_dense_experts_under_the_name_of_packed_ones_are_counted_as_dense() -> None:
    blocks = "model.layers.0.mlp.experts.down_proj_blocks"
    assert doctor.kind_of(blocks, Spec("BF16", (1,))) == "experts, bf16"
    assert doctor.kind_of(blocks, Spec("U8", (1,))) == "experts, packed 4-bit"


@pytest.mark.parametrize(
    ("spare", "said"),
    [(0, "fits, with 0.0 MiB left"), (1 << 21, "fits, with 2.0 MiB left"), (-1, "does not fit: 0.0 MiB too much")],
)
def test_a_model_is_held_against_what_jax_may_take(spare: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = sum(doctor.examine_model(TINY, [TINY / "adapter"], MACHINE, batch=16, context=1024).resident.values())
    machine = dataclasses.replace(MACHINE, devices=(here.Device("a GPU", taken + spare),))
    monkeypatch.setattr(here, "examine_machine", lambda: machine)
    run = CliRunner().invoke(app, ["doctor", "--model", str(TINY), "--adapter", str(TINY / "adapter")])
    assert run.exit_code == 0, run.output
    assert f"of {byte_size(taken + spare)} that JAX may take of the device" in run.stdout
    assert said in run.stdout


def test_the_limit_is_the_one_that_models_are_run_under(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def examine() -> here.Machine:
        seen.append(os.environ.get(NAMES[0]))
        return MACHINE

    monkeypatch.setattr(here, "examine_machine", examine)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    assert seen == [FRACTION]


def test_a_gpu_without_triton_is_an_error_and_not_xla() -> None:
    machine = dataclasses.replace(MACHINE, gpu=True, no_triton="jax-triton is not installed")
    parts = doctor.examine_model(TINY, [], machine, batch=2, context=48).parts
    assert [part.decode for part in parts] == ["error: jax-triton is not installed"] * 4
    assert {part.name: part.prefill for part in parts}["products of q, k, v and o"] == "XLA"


@pytest.mark.parametrize(
    ("capability", "tokens", "want"),
    [(90, 1, "packed_decode"), (90, 100000, "packed_grouped_matmul"), (80, 1, "grouped_matmul")],
)
def test_kernels_of_experts_on_gpus(capability: int, tokens: int, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jmoe.ops.launch.local_gpu.local_gpu", lambda: (capability, "some GPU"))
    machine = dataclasses.replace(MACHINE, gpu=True, no_triton=None)
    parts = {part.name: part for part in doctor.examine_model(TINY, [], machine, batch=tokens, context=48).parts}
    assert parts["experts"].decode == f"Triton: {want}"
    assert parts["full attention"].decode == "Triton: cached_attention"
    assert parts["full attention"].prefill == "XLA, in blocks"


def test_whose_launch_parameters_are_used_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("jmoe.doctor.machine.why_no_triton", lambda: None)
    monkeypatch.setattr("jmoe.ops.launch.local_gpu.local_gpu", lambda: (90, "NVIDIA H200"))
    own = "jmoe's own, NVIDIA H100 80GB HBM3's values, of which none was measured on NVIDIA H200: run jmoe tune"
    assert here.examine_machine().tiles == own
    run = CliRunner().invoke(app, ["doctor"])
    assert "launch parameters" in run.output
    file = tmp_path / "jmoe/tiles/nvidia_h200.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"version": 2, "tiles": {}}')
    assert here.examine_machine().tiles == f"the user's, {file}"
    file.write_text('{"portable": []}')
    machine = here.examine_machine()
    assert machine.tiles is None
    assert any(f"{file}: version must be 2" in problem for problem in machine.missing)


def test_prompts_on_hopper_are_flash_attentions() -> None:
    machine = dataclasses.replace(MACHINE, no_flash=None)
    parts = doctor.examine_model(TINY, [], machine, batch=2, context=48).parts
    assert {part.name: part.prefill for part in parts}["full attention"] == "FlashAttention"


def test_flash_attention_is_missed_on_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "available", lambda: "it needs the package dew-flash-attn-cu13")
    for capability, said in (("8.0", 0), ("9.0", 1)):
        monkeypatch.setattr(flash_attention, "capabilities", lambda capability=capability: [capability])
        assert sum("FlashAttention" in problem for problem in here.examine_machine().missing) == said


def test_a_model_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    run = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path / "model")])
    assert run.exit_code == 1
    assert "lm_head.weight" in str(run.exception)


def test_what_fine_tuning_takes_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--finetune-length", "2048", "--finetune-batch-size", "3", "--finetune-rank", "8"]
    monkeypatch.setattr(memory, "device_limit", lambda: memory.WORKSPACE + 2**28)
    run = CliRunner().invoke(app, ["doctor", "--model", str(TINY), *flags])
    assert run.exit_code == 0, run.output
    assert "memory of fine-tuning, about: 3 x 2048 tokens, LoRA r=8" in run.output
    lines = {line.split()[0]: line for line in run.output.splitlines() if line.split()}
    for remat in ("nothing", "experts", "layers"):
        options = FinetuneConfig(model="m", data="d", out="o", length=2048, batch_size=3, rank=8, remat=remat)
        config = gpt_oss.Config.load(TINY)
        total = memory.estimate(options, config, memory.new_adapter_shapes(options, config)).total
        fits = ", fits" if total <= memory.WORKSPACE + 2**28 else ", of 0.5 GiB that there are"
        assert f"{byte_size(total)}{fits}" in lines[remat]
    assert "fits" in lines["layers"]
