"""Where a model lies on a mesh, as Layout says and as Flax's tools find it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jmoe import gpt_oss
from jmoe.bench.model.case import sizes as model_sizes
from jmoe.gpt_oss import Config, Layout
from jmoe.gpt_oss.random_model import random_model


def mesh_of(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ({"data": 2, "expert": 4}, Layout(data="data", experts="expert")),
        ({"data": 2, "heads": 4}, Layout(data="data", heads="heads")),
        ({"data": 4, "model": 2}, Layout(data="data", experts="model", heads="model")),
    ],
)
def test_axes_are_what_they_are_named_for(sizes: dict[str, int], layout: Layout) -> None:
    assert Layout.of(mesh_of(**sizes), Config.gpt_oss_120b()) == layout


@pytest.mark.parametrize(
    ("sizes", "fsdp", "message"),
    [
        (
            {"expert": 3},
            False,
            "128 experts cannot be split evenly over expert = 3 devices; of up to 3 devices these numbers fit: 1, 2",
        ),
        ({"data": 3, "expert": 2}, True, "128 experts cannot be split evenly over expert x data = 6 devices"),
        (
            {"heads": 16},
            False,
            "8 key heads cannot be split evenly over heads = 16 devices; of up to 16 devices these numbers fit: "
            "1, 2, 4, 8",
        ),
        ({"pipeline": 2}, False, "axes of a mesh must be named data, expert, heads or model, got 'pipeline'"),
        ({"model": 2, "heads": 2}, False, "heads cannot be split over both 'model' and 'heads'"),
        ({"expert": 2}, True, "fsdp splits experts over the data axis, and there is none"),
    ],
)
def test_what_does_not_fit_is_refused(sizes: dict[str, int], fsdp: bool, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout.of(mesh_of(**sizes), Config.gpt_oss_120b(), fsdp=fsdp)


def test_a_layout_must_name_all_axes_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"the layout names mesh axis 'e', and the mesh has \['expert'\]"):
        Layout(experts="e").check(mesh_of(expert=2), Config.gpt_oss_20b())
    with pytest.raises(ValueError, match="mesh axis 'data' splits nothing: name it in the layout"):
        Layout(experts="expert").check(mesh_of(data=2, expert=2), Config.gpt_oss_20b())
    with pytest.raises(ValueError, match="data and heads must be different axes of the mesh, got 'd' for both"):
        Layout(data="d", heads="d")


def test_batches_are_split_over_all_axes_that_divide_them() -> None:
    mesh, layout = mesh_of(data=2, expert=4), Layout(data="data", experts="expert")
    found = [layout.batch_axes(mesh, batch) for batch in (16, 6, 4, 1)]
    assert found == [("data", "expert"), ("data",), ("data",), ()]
    assert layout.batch_axes(mesh_of(data=3, expert=4), 4) == ("expert",)
    assert Layout(experts="model", heads="model").batch_axes(mesh_of(model=2), 4) == ()


def test_flax_finds_the_split_of_every_variable() -> None:
    model = random_model(model_sizes()["tiny"], rank=2, packed=True)
    layout = Layout(data="data", experts="expert", heads="heads", fsdp=True)
    split = gpt_oss.GptOss(
        model.config,
        embedding=model.embedding[...],
        layers=model.stack,
        norm=model.norm[...],
        head=model.head[...],
        lora=model.lora,
        layout=layout,
    )
    specs = {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.get_partition_spec(nnx.state(split)))
    }
    of_experts, of_lora = P(None, ("expert", "data")), P(None, None, "expert")
    rows, columns = P(None, "heads"), P(None, None, "heads")
    want = {
        **dict.fromkeys(("embedding", "norm", "head", "layers.attention_norm", "layers.moe_norm"), P()),
        **dict.fromkeys(("layers.router.weight", "layers.router.bias", "layers.o.bias"), P()),
        **dict.fromkeys(("layers.qkv.weight", "layers.qkv.bias", "layers.sinks"), rows),
        "layers.o.weight": columns,
        **{f"layers.experts.{name}.{part}": of_experts for name in ("gate_up", "down") for part in ("words", "scales")},
        **{f"layers.experts.{name}_bias": of_experts for name in ("gate_up", "down")},
        **{f"lora_{part}.{name}": of_lora for part in "ab" for name in ("gate_up", "down")},
        **{f"lora_a.{name}": P() for name in "qkv"},
        **{f"lora_b.{name}": columns for name in "qkv"},
        "lora_a.o": P(None, None, None, "heads"),
        "lora_b.o": P(),
        **{f"lora_scale.{name}": P() for name in (*"qkvo", "gate_up", "down")},
    }
    assert specs == want
    mesh = jax.make_mesh((1, 1, 1), ("data", "expert", "heads"), axis_types=(AxisType.Auto,) * 3)
    shardings = nnx.get_named_sharding(nnx.state(split), mesh)
    assert shardings["layers"]["o"]["weight"].get_value() == NamedSharding(mesh, columns)


def test_a_model_without_a_layout_has_no_splits_in_its_variables() -> None:
    model = random_model(model_sizes()["tiny"], rank=2)
    assert model.layout is None
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        assert variable.get_metadata("out_sharding", None) is None
    jitted = jax.jit(lambda model: model)(model)
    for one, other in zip(jax.tree.leaves(jitted), jax.tree.leaves(model), strict=True):
        assert np.array_equal(one.view(jnp.uint8), other.view(jnp.uint8))
