#!/usr/bin/env bash
# openai-harmony 0.0.8 beside gpt-oss's chat template (as trl 1.16.0 ships it, rendered by transformers 5.24.0):
# the same call of a function and the same result of it become different tokens. Seen (library / template):
#   the call's header   ` to=functions.f<|channel|>commentary <|constrain|>json` / `... commentary json`, without the control token
#   the tool's result   as it is: `sunny "ok"`                                    / as a JSON string: `"sunny \"ok\""`
# A conversation of thinking, an answer and another question becomes the same text in both.
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
    Author, Conversation, DeveloperContent, HarmonyEncodingName, Message, Role, SystemContent, ToolDescription,
    load_harmony_encoding,
)
from transformers.utils.chat_template_utils import render_jinja_template

here = Path(sys.argv[1])
with zipfile.ZipFile(next(here.glob("trl-*.whl"))) as wheel:
    template = wheel.read("trl/chat_templates/gptoss.jinja").decode()
with zipfile.ZipFile(next(here.glob("litellm-*.whl"))) as wheel:
    (name,) = [n for n in wheel.namelist() if n.endswith("tokenizers/fb374d419588a4632f3f557e76b4b70aebbca790")]
    (here / "o200k_base.tiktoken").write_bytes(wheel.read(name))
encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def turn(role, content, channel=None):
    message = Message.from_role_and_content(role, content)
    return message if channel is None else message.with_channel(channel)


def by_library(turns, tools):
    system = SystemContent.new().with_conversation_start_date(datetime.date.today().isoformat())
    messages = [Message.from_role_and_content(Role.SYSTEM, system)]
    if tools:
        tool = ToolDescription.new("f", "Does it.", parameters=PARAMETERS)
        developer = DeveloperContent.new().with_function_tools([tool])
        messages.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    conversation = Conversation.from_messages([*messages, *turns])
    return encoding.decode_utf8(encoding.render_conversation_for_completion(conversation, Role.ASSISTANT))


def by_template(messages, tools):
    tool = {"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": PARAMETERS}}
    (text,), _ = render_jinja_template(
        conversations=[messages], tools=[tool] if tools else None, chat_template=template, add_generation_prompt=True
    )
    return text


question, thinking = turn(Role.USER, "hi"), turn(Role.ASSISTANT, "I need it.", "analysis")
answer, thanks = turn(Role.ASSISTANT, "Sunny.", "final"), turn(Role.USER, "thanks")
plain = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "thinking": "I need it.", "content": "Sunny."},
    {"role": "user", "content": "thanks"},
]
assert by_library([question, thinking, answer, thanks], False) == by_template(plain, False), "without tools they differ now"

call = turn(Role.ASSISTANT, '{"city": "Oslo"}', "commentary").with_recipient("functions.f")
call = call.with_content_type("<|constrain|>json")
result = Message.from_author_and_content(Author.new(Role.TOOL, "functions.f"), 'sunny "ok"')
result = result.with_channel("commentary").with_recipient("assistant")
called = [
    plain[0],
    {
        "role": "assistant",
        "thinking": "I need it.",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}],
    },
    {"role": "tool", "name": "f", "content": 'sunny "ok"'},
]
library, text = by_library([question, thinking, call, result], True), by_template(called, True)
for name, rendered in (("library ", library), ("template", text)):
    print(name, rendered[rendered.index("<|start|>assistant to=") :])
assert '<|channel|>commentary <|constrain|>json<|message|>{"city": "Oslo"}<|call|>' in library
assert '<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>' in text
assert '<|message|>sunny "ok"<|end|>' in library and '<|message|>"sunny \\"ok\\""<|end|>' in text
PY
TIKTOKEN_ENCODINGS_BASE=$dir "$dir/venv/bin/python" "$dir/compare.py" "$dir"
