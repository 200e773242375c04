"""Files of options: TOML, YAML or JSON, and an example of one with every option in it."""

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from jmoe.finetune.config import FinetuneConfig, choices_of

type Format = Literal["toml", "yaml"]

EXAMPLES = {"model": "openai/gpt-oss-20b", "data": ("train.jsonl",), "out": "run"}
"""What stands in an example for the options that have no default."""


ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")
"""What JSON may hold as it is, and TOML or YAML may not."""


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The entries of a file: JSON where it is called .json, YAML where .yaml or .yml, else TOML.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it cannot be read as that, has a name twice, or holds no table of names and values.
    """
    file = Path(path)
    kinds: dict[str, tuple[str, Callable[[str], Any]]] = {
        ".json": ("JSON", parse_json),
        ".yaml": ("YAML", parse_yaml),
        ".yml": ("YAML", parse_yaml),
    }
    kind, parse = kinds.get(file.suffix.lower(), ("TOML", tomllib.loads))
    content = file.read_bytes()
    try:
        entries = parse(content.decode("utf-8-sig").replace("\r\n", "\n"))
    except RecursionError:
        raise ValueError(f"{file} is not {kind} that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{file} is not {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file} must hold names and values, got {type(entries).__name__}")
    if others := [name for name in entries if not isinstance(name, str)]:
        raise ValueError(f"{file} must have texts for names, got {type(others[0]).__name__} {others[0]!r}")
    return entries


def parse_json(text: str) -> Any:
    """JSON. Raises ValueError where the text is invalid, or an object has a name twice."""
    return json.loads(text, object_pairs_hook=without_repeats)


def without_repeats(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The pairs as a dictionary. Raises ValueError where a name is there twice."""
    entries: dict[Any, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"{name!r} is there twice")
        entries[name] = value
    return entries


def parse_yaml(text: str) -> Any:
    """YAML 1.2's plain values, as JSON has them.

    PyYAML itself reads YAML 1.1, in which `no` is false, 1e-4 a text, 010 is 8 and 2026-11-30 a date.

    Raises:
      ValueError: the text is not YAML, has a name twice, or a tag or anything else that JSON does not have.
      ImportError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError('options in YAML need PyYAML: pip install "jmoe[finetune]"') from error

    class Loader(yaml.SafeLoader):
        """PyYAML's, with other rules for plain values."""

        yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}
        yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        pairs = [(loader.construct_object(k, True), loader.construct_object(v, True)) for k, v in node.value]
        if any(not isinstance(name, str) for name, _ in pairs):
            raise ValueError(f"names must be texts, in line {node.start_mark.line + 1}")
        return without_repeats(pairs)

    def integer(loader: Any, node: Any) -> int:
        return int(node.value, 0) if node.value[:2] in ("0x", "0o") else int(node.value)

    constructors: dict[str, Any] = {
        "map": mapping,
        "seq": lambda loader, node: [loader.construct_object(item, True) for item in node.value],
        "str": lambda loader, node: loader.construct_scalar(node),
        "null": lambda loader, node: None,
        "bool": lambda loader, node: node.value.lower() == "true",
        "int": integer,
        "float": lambda loader, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan")),
    }
    for tag, construct in constructors.items():
        Loader.add_constructor(f"tag:yaml.org,2002:{tag}", construct)
    for tag, pattern in (
        ("null", r"~|null|Null|NULL|"),
        ("bool", r"true|True|TRUE|false|False|FALSE"),
        ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), None)
    try:
        for event in yaml.parse(text):
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"tags as {event.tag} have no meaning here, in line {event.start_mark.line + 1}")
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def write_example(given: Mapping[str, Any], kind: Format = "toml") -> str:
    """A file with every option and its help, which read_file reads back.

    Options that are given have their values, the others their defaults; those without either stand behind a #.

    given: by FinetuneConfig's names, as FinetuneConfig.create takes them.
    """
    config = FinetuneConfig.create(EXAMPLES | dict(given))
    sign = "=" if kind == "toml" else ":"
    before = " " if kind == "toml" else ""
    lines = [f"# Options of `jmoe finetune --config FILE`, in {kind.upper()}; flags win over them."]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        text = (
            ""
            if value is None
            else ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
        )
        unset = "# " if field.default is None and given.get(field.name) is None else ""
        choices = f" ({', '.join(choices_of(field.name))})" if choices_of(field.name) else ""
        lines += ["", f"# {field.metadata['help']}{choices}", f"{unset}{field.name}{before}{sign} {text}".rstrip()]
    return "\n".join(lines) + "\n"
