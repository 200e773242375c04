"""What is written after --mesh."""

import re

import jax
import pytest

from jmoe.device_mesh import make_mesh, parse_mesh_sizes, planned_mesh


@pytest.mark.parametrize(
    ("text", "devices", "sizes"),
    [
        ("data=2,expert=4", 8, {"data": 2, "expert": 4}),
        (" expert = 4 , data = -1 ", 8, {"expert": 4, "data": 2}),
        ("model=-1", 1, {"model": 1}),
        ("data=2,expert=2,heads=2", 8, {"data": 2, "expert": 2, "heads": 2}),
    ],
)
def test_sizes_multiply_to_the_devices(text: str, devices: int, sizes: dict[str, int]) -> None:
    assert list(parse_mesh_sizes(text, devices).items()) == list(sizes.items())


@pytest.mark.parametrize(
    ("text", "devices", "message"),
    [
        ("", 8, "a mesh is written as data=2,expert=4, got ''"),
        ("data", 8, "a mesh is written as data=2,expert=4, got 'data' in 'data'"),
        ("data=two", 8, "a mesh is written as data=2,expert=4, got 'data=two'"),
        ("tensor=8", 8, "axes of a mesh are data, expert, heads, model, got 'tensor'"),
        ("data=2,data=4", 8, "each axis of a mesh is given once, got data twice"),
        ("data=0", 8, "the size of data must be at least 1, or -1 for all other devices, got 0"),
        ("data=-1,expert=-1", 8, "one axis of a mesh may be -1, got data and expert"),
        ("model=2,heads=4", 8, "model splits experts and heads, so that heads cannot be beside it"),
        ("data=-1,expert=3", 8, "mesh data=-1,expert=3 needs a multiple of 3 devices, and there are 8 devices"),
        (
            "data=2,expert=2",
            8,
            "mesh data=2,expert=2 is of 4 devices, and there are 8 devices; with the others as they are data=4 or "
            "expert=4 would fit",
        ),
        (
            "data=2",
            1,
            "mesh data=2 is of 2 devices, and there is 1 device; with the others as they are data=1 would fit",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_that_says_what_would(text: str, devices: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_mesh_sizes(text, devices)
    assert "\n" not in str(error.value)


def test_the_mesh_has_all_devices_and_auto_axes() -> None:
    mesh = make_mesh("expert=-1", jax.devices("cpu"))
    assert mesh.shape == {"expert": len(jax.devices("cpu"))}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)


def test_a_mesh_may_be_of_devices_that_are_not_here() -> None:
    assert planned_mesh("data=8,model=8").shape == {"data": 8, "model": 8}
    assert planned_mesh("expert=-1").shape == {"expert": jax.device_count()}
