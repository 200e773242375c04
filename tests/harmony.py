"""gpt-oss's own tokenizer and chat template, from packages: neither is in this repository.

The ranks of o200k_base come from a registry's copy (MIT), checked by the hash that tiktoken expects of OpenAI's; the
chat template is the one that trl ships (Apache-2.0), read from its installed wheel and not imported.
"""

import base64
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

NPM_PACKAGE = "tiktoken@1.0.22"
PYPI_PACKAGE = "litellm==1.110.2"
PYPI_FILE = "litellm/litellm_core_utils/tokenizers/fb374d419588a4632f3f557e76b4b70aebbca790"
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
TEMPLATE_FILE = "trl/chat_templates/gptoss.jinja"
SECONDS = 180

CONTROL = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|endofprompt|>": 200018,
}
"""The named control tokens; the ids between them are <|reserved_ID|>."""

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""How o200k_base splits text before it joins bytes."""


class NoRegistryError(Exception):
    """No package registry gave the ranks."""


def make_directory(folder: Path) -> Path:
    """Writes tokenizer and chat template into a folder, as a checkpoint has them.

    Raises:
      NoRegistryError: the ranks are not cached, and no registry gave them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(ranks()), ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(chat_template())
    return folder


def chat_template() -> str:
    return Path(str(importlib.metadata.distribution("trl").locate_file(TEMPLATE_FILE))).read_text()


def ranks() -> dict[bytes, int]:
    """Each token of o200k_base with its rank, from the user's cache or a registry."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = caches / "jmoe" / "tests" / "o200k_base.tiktoken"
    content = cached.read_bytes() if cached.is_file() else b""
    if hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        content = fetch_ranks()
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(cached)
    lines = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def fetch_ranks() -> bytes:
    """The ranks as tiktoken keeps them, a line each of a token in base64 and its rank."""
    sources: list[Callable[[Path], bytes]] = [from_npm] if shutil.which("npm") else []
    failures = []
    for source in [*sources, from_pypi]:
        try:
            with tempfile.TemporaryDirectory() as folder:
                content = source(Path(folder))
        except (OSError, subprocess.SubprocessError) as error:
            failures.append(f"{source.__name__}: {error}")
            continue
        if (found := hashlib.sha256(content).hexdigest()) == RANKS_SHA256:
            return content
        failures.append(f"{source.__name__}: the ranks must have SHA-256 {RANKS_SHA256}, got {found}")
    raise NoRegistryError("; ".join(failures))


def from_npm(folder: Path) -> bytes:
    run(["npm", "pack", "--silent", NPM_PACKAGE], folder)
    (package,) = folder.glob("*.tgz")
    with tarfile.open(package) as files:
        member = files.extractfile("package/encoders/o200k_base.json")
        assert member is not None
        text = json.load(member)["bpe_ranks"]
    found = {}
    for line in filter(str.strip, text.split("\n")):  # "! FIRST_RANK TOKEN TOKEN ..."
        _, first, *tokens = line.split(" ")
        found.update(enumerate(tokens, start=int(first)))
    return "".join(f"{found[rank]} {rank}\n" for rank in sorted(found)).encode()


def from_pypi(folder: Path) -> bytes:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    wheel = ["--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64"]
    run([*pip, *wheel, "--dest=.", PYPI_PACKAGE], folder)
    (package,) = folder.glob("*.whl")
    with zipfile.ZipFile(package) as files:
        return files.read(PYPI_FILE)


def run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL)


def tokenizer_json(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The file of the tokenizers library: byte-level BPE, whose merges are all splits of a token into two others."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(splits, key=lambda parts: (ranks[parts[0]], ranks[parts[1]]))
    letters = byte_letters()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = {**{rank: f"<|reserved_{rank}|>" for rank in range(199998, 200019)}, **{i: s for s, i in CONTROL.items()}}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": rank, "content": name, **flags} for rank, name in names.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_alone]},
        "post_processor": None,
        "decoder": bytes_alone,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelt[token]: rank for token, rank in ranks.items()},
            "merges": [[spelt[left], spelt[right]] for left, right in merges],
        },
    }


def byte_letters() -> dict[int, str]:
    """The printable character that byte-level vocabularies write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
