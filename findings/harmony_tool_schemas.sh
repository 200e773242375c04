#!/usr/bin/env bash
# openai-harmony 0.0.8 beside gpt-oss's chat template (as trl 1.16.0 ships it, rendered by transformers 5.24.0):
# the same function tools become different text, so a model is prompted with other tokens than it was trained on when one side
# trains through the template and the other serves through the library. Seen (library / template):
#   a default               `u?: "c" | "f", // default: c`     / `u?: "c" | "f", // default: c,`
#   an object in an object  each member a line of its own       / members behind a line break and 16 spaces
#   oneOf                   ` | string` and ` | number` lines   / `u?: string | ` and `number,`
#   no properties           `type f = (_: {` `}) => any;`       / `type f = () => any;`
# while plain types, enums, nullable types, arrays of plain types and anyOf become the same text.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
pip=("$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install openai-harmony==0.0.8 transformers==5.24.0 jinja2==3.1.6
"${pip[@]}" download --no-deps --dest "$dir" trl==1.16.0
# The library wants OpenAI's file of token ranks, of which litellm carries a copy under a name of its own.
"${pip[@]}" download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --dest "$dir" litellm==1.110.2
cat >"$dir/compare.py" <<'PY'
import datetime
import sys
import zipfile
from pathlib import Path

from openai_harmony import (
    Conversation, DeveloperContent, HarmonyEncodingName, Message, Role, SystemContent, ToolDescription,
    load_harmony_encoding,
)
from transformers.utils.chat_template_utils import render_jinja_template

here = Path(sys.argv[1])
with zipfile.ZipFile(next(here.glob("trl-*.whl"))) as wheel:
    template = wheel.read("trl/chat_templates/gptoss.jinja").decode()
encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


def by_library(parameters):
    day = datetime.date.today().isoformat()
    tool = ToolDescription.new("f", "Does it.", parameters=parameters)
    messages = [
        Message.from_role_and_content(Role.SYSTEM, SystemContent.new().with_conversation_start_date(day)),
        Message.from_role_and_content(Role.DEVELOPER, DeveloperContent.new().with_function_tools([tool])),
        Message.from_role_and_content(Role.USER, "hi"),
    ]
    tokens = encoding.render_conversation_for_completion(Conversation.from_messages(messages), Role.ASSISTANT)
    return encoding.decode_utf8(tokens)


def by_template(parameters):
    tool = {"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": parameters}}
    (text,), _ = render_jinja_template(
        conversations=[[{"role": "user", "content": "hi"}]], tools=[tool], chat_template=template,
        add_generation_prompt=True,
    )
    return text


def of(schema):
    return {"type": "object", "properties": {"u": schema}}


member = {"type": "object", "properties": {"a": {"type": "number"}}}
same = {
    "plain": {"type": "string", "description": "Where."},
    "enum": {"type": "string", "enum": ["c", "f"]},
    "nullable": {"type": ["string", "null"]},
    "array": {"type": "array", "items": {"type": "string"}},
    "anyOf": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
}
other = {
    "default": of({"type": "string", "enum": ["c", "f"], "default": "c"}),
    "object in an object": of(member),
    "array of objects": of({"type": "array", "items": member}),
    "oneOf": of({"oneOf": [{"type": "string"}, {"type": "integer"}]}),
    "no properties": {"type": "object", "properties": {}},
}
for name, schema in same.items():
    assert by_library(of(schema)) == by_template(of(schema)), f"{name}: the texts differ now"
for name, parameters in other.items():
    library, text = by_library(parameters), by_template(parameters)
    assert library != text, f"{name}: the texts are the same now"
    print(f"{name}\n  library  {library.split('namespace functions {')[1].split('} // namespace')[0]!r}")
    print(f"  template {text.split('namespace functions {')[1].split('} // namespace')[0]!r}")
assert "// default: c\n" in by_library(other["default"]) and "// default: c,\n" in by_template(other["default"])
PY
"$dir/venv/bin/python" - "$dir" <<'PY'
import sys, zipfile
from pathlib import Path
here = Path(sys.argv[1])
with zipfile.ZipFile(next(here.glob("litellm-*.whl"))) as wheel:
    (name,) = [n for n in wheel.namelist() if n.endswith("tokenizers/fb374d419588a4632f3f557e76b4b70aebbca790")]
    (here / "o200k_base.tiktoken").write_bytes(wheel.read(name))
PY
TIKTOKEN_ENCODINGS_BASE=$dir "$dir/venv/bin/python" "$dir/compare.py" "$dir"
