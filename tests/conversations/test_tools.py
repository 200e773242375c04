"""Tools of a row as people describe them: where their parameters' schema is, and what it is written as."""

import datetime
import json
from typing import Any

import pytest

from jmoe.conversations.tools import read_tools

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    "tool",
    [
        FUNCTION,
        {"name": "f", "description": "d", "input_schema": SCHEMA},
        {"name": "f", "description": "d", "inputSchema": SCHEMA},
        {"type": "function", "function": {**FUNCTION, "parameters": json.dumps(SCHEMA)}},
        {"type": "function", "function": json.dumps(FUNCTION)},
        json.dumps(TOOL),
    ],
)
def test_parameters_are_found_however_they_are_written(tool: Any) -> None:
    assert read_tools([tool]) == (TOOL,)


@pytest.mark.parametrize("schema", [{}, "", {"type": "object"}, {"type": "object", "additionalProperties": {}}])
def test_a_function_may_have_no_parameters(schema: Any) -> None:
    (tool,) = read_tools([{**FUNCTION, "parameters": schema}])
    assert tool["function"]["parameters"] == (schema or {})


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ({"parameters": {"city": {"type": "str"}}}, r"function\.parameters must be a JSON schema .*got \{'city'"),
        ({"parameters": {"type": {"type": "str"}}}, r"function\.parameters must be a JSON schema"),
        ({"parameters": "{city"}, r"function\.parameters must be a JSON schema .* got '\{city'"),
        ({"parameters": ["city"]}, r"function\.parameters must be a JSON schema"),
        ({"parameters": SCHEMA, "input_schema": SCHEMA}, r"one schema .* parameters and input_schema"),
        ({"description": datetime.datetime(2026, 1, 2)}, r"must be JSON \(.*datetime"),
        ({"parameters": {**SCHEMA, "default": datetime.date(2026, 1, 2)}}, r"must be JSON \(.*date"),
    ],
)
def test_what_a_template_would_leave_out_is_refused(function: Any, error: str) -> None:
    with pytest.raises(ValueError, match=rf"^tools\[0\].*{error}"):
        read_tools([{"name": "f", **function}])
