"""Makes jmoe's annotations of arrays hold while tests run: a call with other shapes or dtypes fails."""

import ast
import functools
import operator
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beartype
import jax
import jaxtyping
import numpy as np

ROOT = Path(__file__).parent.parent


def install() -> None:
    """Has them checked in every module imported from now on that has some.

    Left out are the modules of public functions, whose ValueErrors say more than a type checker.
    """
    paths = sorted(path for path in (ROOT / "jmoe").rglob("*.py") if "from jaxtyping import" in path.read_text())
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    inner = [name for name in names if name not in public_modules()]
    jaxtyping.install_import_hook(inner, f"{__name__}.{check.__name__}")


@functools.cache
def public_modules() -> set[str]:
    """The modules that jmoe's and its rooms' public names are of, found without importing any: the hook comes first."""
    files = [ROOT / "jmoe" / "__init__.py", *(ROOT / "jmoe").glob("*/__init__.py")]
    trees = [ast.parse(file.read_text()) for file in files]
    found = {node.module for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name for name in found if name is not None}


def check[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The function with its annotations of arrays checked at each call; mypy sees to the others.

    Not what makes an object: as pytrees they also hold what transformations put in the arrays' places.
    """
    if function.__name__ == "__init__":
        return function
    hints = function.__annotations__.items()
    function.__annotations__ = {name: checkable(hint) for name, hint in hints if is_about_arrays(hint)}
    return beartype.beartype(function) if function.__annotations__ else function


def is_about_arrays(hint: Any) -> bool:
    """Whether a shape and dtype stand anywhere in it."""
    if isinstance(hint, typing.TypeAliasType):
        return is_about_arrays(hint.__value__)
    return is_array(hint) or any(is_about_arrays(part) for part in typing.get_args(hint))


def is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def checkable(hint: Any) -> Any:
    """The same of NumPy's arrays too, as a checkpoint's are at first.

    Sizes that are computed, as 2I and D/2, may be any: jaxtyping knows D only where it stands before by itself.
    """
    if isinstance(hint, typing.TypeAliasType):
        return checkable(hint.__value__)
    if is_array(hint):
        sizes = ("_" if re.search(r"^\d+[A-Za-z]|\w[-+*/]\w", size) else size for size in hint.dim_str.split())
        array = jax.Array | np.ndarray if hint.array_type is jax.Array else hint.array_type
        return hint.dtype[array, " ".join(sizes)]
    if typing.get_origin(hint) is tuple and ... in typing.get_args(hint):
        return tuple  # of which each may have sizes of its own
    parts = tuple(checkable(part) if is_about_arrays(part) else part for part in typing.get_args(hint))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return functools.reduce(operator.or_, parts)
    origin = typing.get_origin(hint)
    return hint if origin is None else origin[parts]
