"""Descriptions of functions as people write them, to those that chat templates know."""

import json
from collections.abc import Mapping
from typing import Any

from jmoe.conversations.turns import check_text, from_json
from jmoe.errors import in_short

SCHEMA = ("parameters", "input_schema", "inputSchema")
"""What the schema of a function's parameters is called: by OpenAI, by Anthropic, and by MCP's servers."""

OF_SCHEMAS = {"properties", "$defs", "definitions", "patternProperties", "additionalProperties", "items", "not"}
"""Names of JSON schemas whose values may be objects."""


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The functions that the assistant may call, each as {"type": "function", "function": {...}}.

    Raises:
      ValueError: it is not a list of functions with names; parameters are not a JSON schema; a value is not
        one that JSON has.
    """
    tools = from_json(value, "[")
    if not isinstance(tools, list):
        raise ValueError(f"tools must be a list of functions, got {in_short(value)}")
    return tuple(_read_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools))


def _read_tool(name: str, value: Any) -> Mapping[str, Any]:
    tool = from_json(value, "{")
    if not isinstance(tool, dict):
        raise ValueError(f"{name} must be an object that describes a function, got {in_short(value)}")
    function = from_json(tool.get("function"), "{")
    if function is None:
        function = {key: part for key, part in tool.items() if key != "type"}
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise ValueError(f'{name} must be a function {{"type": "function", "function": ...}}, got {in_short(value)}')
    check_text(f"{name}.function.name", function.get("name"))
    try:
        json.dumps(function)
    except TypeError as error:  # a date that a data set was given; a template writes what kind it is
        raise ValueError(f"{name} must be JSON ({error}), got {in_short(function)}") from error
    function = _with_parameters(name, function)
    # gpt-oss's template has no function without a description.
    described = function if function.get("description") is not None else {**function, "description": ""}
    rest = tool if "function" in tool else {}
    return {**rest, "type": "function", "function": described}


def _with_parameters(name: str, function: dict[str, Any]) -> dict[str, Any]:
    """The function with its parameters' schema under the name and in the form that templates read."""
    found = {key: from_json(function[key], "{") for key in SCHEMA if function.get(key) is not None}
    if len(found) > 1:
        raise ValueError(f"{name} must have one schema of its parameters, got {' and '.join(found)}")
    if not found:
        return function
    ((key, schema),) = found.items()
    if schema == "":  # a column's, where another tool has some
        schema = {}
    if not isinstance(schema, dict) or _lists_parameters_alone(schema):
        raise ValueError(
            f'{name}.function.{key} must be a JSON schema {{"type": "object", "properties": {{...}}}}, got '
            f"{in_short(schema)}"
        )
    return {**{other: part for other, part in function.items() if other != key}, "parameters": schema}


def _lists_parameters_alone(schema: Mapping[str, Any]) -> bool:
    """Whether the object has parameters by their names where a schema has `properties`: templates would show none."""
    return "properties" not in schema and any(
        isinstance(part, dict) for key, part in schema.items() if key not in OF_SCHEMAS
    )
