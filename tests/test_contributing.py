"""CONTRIBUTING.md: its tables of ops name what is there, and every kernel is in them."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def table(first: str) -> list[dict[str, str]]:
    """The rows of the table whose header begins so, by column."""
    lines = TEXT[TEXT.index(first) :].split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


KERNELS = table("| op | kernel | plan |")
OPERATIONS = table("| op | function | oracle |")
NAMES = [
    name for row in KERNELS + OPERATIONS for column, cell in row.items() if column != "op" for name in cell.split()
]


@functools.cache
def functions(file: str) -> dict[str, ast.FunctionDef]:
    """The functions of a module, by name."""
    body = ast.parse((ROOT / file).read_text()).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_what_the_map_names_is_there(name: str) -> None:
    found = re.fullmatch(r"`([\w/]+\.py)(?:::(\w+))?`", name)
    assert found is not None, "a path, or a path::function"
    file, function = found.groups()
    if function is not None:
        assert function in functions(file), f"{file} defines no {function}"
    else:
        assert any(test.startswith("test_") for test in functions(file)), f"{file} has no test"


def test_every_kernel_is_in_the_map_once() -> None:
    there = sorted(
        f"`{path.relative_to(ROOT)}::{name}`"
        for path in (ROOT / "triton_src").rglob("*.py")
        for name, node in functions(str(path.relative_to(ROOT))).items()
        if name.endswith("_kernel") and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    )
    assert there == sorted(name for row in KERNELS for name in row["kernel"].split())


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row["op"])
def test_an_op_has_its_name_in_every_room(row: dict[str, str]) -> None:
    folder, _, op = row["op"].rpartition("/")
    folder = folder or op
    for column in ("kernel", "plan"):
        for name in row[column].split():
            file = name.strip("`").split("::")[0]
            assert file.startswith(f"triton_src/{folder}/")
            assert folder == op or file == f"triton_src/{folder}/{op}.py"
    assert f"`tests/triton_src/{folder}/test_{op}.py`" in row["test"].split()
    if folder in ("decode", "paged"):
        assert row["launch"].startswith(f"`jmoe/ops/{folder}/{op}.py::")
        assert f"`tests/ops/{folder}/test_{op}.py`" in row["test"].split()
        assert row["test on a GPU"] == f"`tests/gpu/{folder}/test_{op}.py`"


@pytest.mark.parametrize("row", OPERATIONS, ids=lambda row: row["op"])
def test_an_operation_of_jax_has_its_name_in_both_rooms(row: dict[str, str]) -> None:
    assert all(name.startswith(f"`jmoe/ops/{row['op']}.py::") for name in row["function"].split())
    assert row["test"] == f"`tests/ops/test_{row['op']}.py`"
