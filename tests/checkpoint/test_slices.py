"""Slices of a checkpoint's tensors, in each form of files: those of the whole tensor, and the rest is not read."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from jmoe import gpt_oss
from jmoe.checkpoint import Checkpoint
from jmoe.device_mesh import make_mesh
from jmoe.gpt_oss import Layout
from tests.checkpoints import TINY, cast, dense, retype, tensors_of, written, written_original
from tests.trees import tree_equal

PREFIX = "model.layers.1."
INDICES = [(), (slice(1, 3),), (slice(2, None),), (slice(None), slice(5, 37)), (slice(0, 2), slice(None), slice(1, 2))]
FORMS: dict[str, Callable[[Path], Path]] = {
    "mxfp4": lambda folder: TINY,
    "original": written_original,
    "dense": lambda folder: written(folder, dense(tensors_of(TINY))),
    "swapped": lambda folder: written(folder, dense(tensors_of(TINY), swapped=True)),
    "float32": lambda folder: written(folder, cast(dense(tensors_of(TINY)), np.float32)),
}


@pytest.mark.filterwarnings("ignore::jmoe.checkpoint.config_file.CheckpointWarning")
@pytest.mark.parametrize("form", FORMS)
def test_slices_are_those_of_the_whole_tensor(form: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(FORMS[form](tmp_path / "model"))
    experts = "gate_up_proj_blocks" if form in ("mxfp4", "original") else "gate_up_proj"
    names = ["self_attn.q_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight", f"mlp.experts.{experts}"]
    for name in (PREFIX + name for name in names):
        whole = checkpoint.tensor(name)
        for index in INDICES:
            if len(index) <= whole.ndim:
                got = checkpoint.slices(name, *index)
                assert (got.dtype, got.shape) == (whole.dtype, whole[index].shape)
                assert np.array_equal(got, whole[index]), (name, index)


def test_rows_of_scales_typed_as_what_they_are(tmp_path: Path) -> None:
    directory = written(tmp_path / "model", tensors_of(TINY))
    name = f"{PREFIX}mlp.experts.down_proj_scales"
    whole = Checkpoint(directory).tensor(name)
    retype(directory / "model.safetensors", "_scales", "F8_E8M0")
    assert np.array_equal(Checkpoint(directory).slices(name, slice(1, 3), slice(4)), whole[1:3, :4])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jmoe.checkpoint.config_file.CheckpointWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quantize", [None, "mxfp4"])
def test_a_model_is_read_onto_a_mesh_from_each_form(
    form: str, quantize: Literal["mxfp4"] | None, tmp_path: Path
) -> None:
    directory = FORMS[form](tmp_path / "model")
    mesh = make_mesh("model=2", jax.devices("cpu"))
    layout = Layout.of(mesh)
    options = {"quantize": quantize, "packed": quantize is not None, "progress": False}
    split = gpt_oss.load(directory, mesh=mesh, layout=layout, **options)
    assert tree_equal(split, gpt_oss.load(directory, **options).on_mesh(mesh, layout))
