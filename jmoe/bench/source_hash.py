"""What a result is of: a hash of the code that was measured, which a change of comments or docstrings leaves alone.

A result whose hash is another than today's is stale: README says so beside it, and a test lists it.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

LAYER = ("jmoe/triton_src", "jmoe/ops")
"""Kernels, plans, tables of launch parameters, and what launches them from JAX."""

PARITY = (*LAYER, "jmoe/interop")
"""As LAYER, and what launches them from torch."""

MODEL = (*LAYER, "jmoe/nn", "jmoe/gpt_oss", "jmoe/finetune/step.py", "jmoe/finetune/loss.py")
"""As LAYER, and the model and its training step."""


def source_hash(places: Iterable[str], root: Path = ROOT) -> str:
    """Of the Python and JSON files that these are or hold: sixteen hexadecimal digits.

    places: folders and files under `root`.

    Raises:
      FileNotFoundError: a place does not exist.
    """
    files: dict[str, str] = {}
    for place in places:
        path = root / place
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        found = [path] if path.is_file() else [each for kind in ("*.py", "*.json") for each in path.rglob(kind)]
        files |= {each.relative_to(root).as_posix(): each.read_text() for each in found}
    return hash_of(files)


def hash_of(files: Mapping[str, str]) -> str:
    """The hash of files' texts by name."""
    digests = {name: digest(name.endswith(".json"), text) for name, text in files.items()}
    named = {name: one for name, one in digests.items() if one}
    return sha256(json.dumps(named, sort_keys=True))[:16]


@functools.cache
def digest(is_json: bool, text: str) -> str:
    """Of what a file says to the machine; empty for a module that is a docstring alone."""
    meaning = json.loads(text) if is_json else syntax(ast.parse(text).body)
    return sha256(json.dumps(meaning, sort_keys=True)) if meaning else ""


def sha256(text: str) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def syntax(node: Any) -> Any:
    """A syntax tree as JSON, the same for each version of Python: without positions, docstrings and empty fields."""
    if isinstance(node, list):
        return [syntax(each) for each in node if not is_docstring(each)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return [type(node).__name__, *([name, syntax(value)] for name, value in fields)]


def is_docstring(node: Any) -> bool:
    """Whether it is a string that nothing uses: a docstring, also one below a constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
