"""Where rows are read from: files in several formats, directories that `datasets` saved, and the Hub."""

import bz2
import csv
import gzip
import json
import lzma
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from jmoe.conversations.rows import Completion, Conversation, Text
from jmoe.conversations.sources import open_source
from jmoe.finetune.examples import read_examples
from jmoe.text import load_tokenizer
from tests.conversations.reading import read_rows

datasets = pytest.importorskip("datasets")

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Ho"}
ROWS = [{"prompt": "a", "completion": "b, π"}, {"prompt": 'say "c"', "completion": "d\ne"}]
WANT = [Completion("a", "b, π"), Completion('say "c"', "d\ne")]


def lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(path: Path, rows: Sequence[Mapping[str, Any]], separator: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def places(source: str | Path) -> list[str]:
    return [record.place.removeprefix(str(source)) for record in open_source(source).records]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    match kind:
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines(ROWS)))
        case "json":
            path.write_text(json.dumps(ROWS, indent=2))
        case "json.gz":
            path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
        case "csv":
            table(path, ROWS)
        case "tsv":
            table(path, ROWS, "\t")
        case "csv.gz":
            path.write_bytes(gzip.compress(table(folder / "rows.csv", ROWS).read_bytes()))
        case "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        case "saved":
            datasets.Dataset.from_list(ROWS).save_to_disk(path)
        case "bom.jsonl":
            path.write_bytes(b"\xef\xbb\xbf" + lines(ROWS))
    return path


KINDS = ("jsonl.gz", "json", "json.gz", "csv", "tsv", "csv.gz", "parquet", "saved", "bom.jsonl")


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    assert list(read_rows(write(tmp_path, kind))) == WANT


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("jsonl.gz", [", line 1", ", line 2"]),
        ("json", [", row 1", ", row 2"]),
        ("csv", [", line 2", ", line 3"]),
        ("parquet", [", row 1", ", row 2"]),
        ("saved", [", row 1", ", row 2"]),
    ],
)
def test_rows_have_places(kind: str, want: list[str], tmp_path: Path) -> None:
    assert places(write(tmp_path, kind)) == want


def test_a_csvs_place_is_the_line_where_the_row_begins(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text\n"a\nb"\n\nc\n')
    assert places(path) == [", line 2", ", line 5"]


def test_a_pattern_reads_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"text": name}]))
    assert list(read_rows(f"{tmp_path}/*.jsonl")) == [Text("a"), Text("b")]


def test_several_sources_are_read_one_after_the_other(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    files = [write(tmp_path, kind) for kind in ("jsonl.gz", "csv")]
    both = read_examples(files, tokenizer, max_length=64)
    alone = [example for file in files for example in read_examples(file, tokenizer, max_length=64).examples]
    assert [example.tokens.tolist() for example in both.examples] == [example.tokens.tolist() for example in alone]
    assert both.rows == 4


def test_a_csvs_conversation_is_written_as_json(tmp_path: Path) -> None:
    path = table(tmp_path / "rows.csv", [{"messages": json.dumps([USER, ASSISTANT]), "tools": "", "id": "3"}])
    assert list(read_rows(path)) == [Conversation((USER, ASSISTANT))]


def test_a_csvs_prompt_and_completion_are_texts_or_messages_written_as_json(tmp_path: Path) -> None:
    messages = {"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])}
    path = table(tmp_path / "rows.csv", [messages, {**messages, "completion": "[1]"}])
    assert list(read_rows(path)) == [Conversation((USER, ASSISTANT)), Completion(messages["prompt"], "[1]")]


CALL = {"function": {"name": "f", "arguments": {"city": "Oslo", "days": [1, 2]}}}
OTHER_CALL = {"function": {"name": "g", "arguments": {"zone": {"name": "CET"}}}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g", "description": "d"}},
]
MIXED: list[Mapping[str, Any]] = [
    {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": TOOLS},
    {"messages": [USER, {"role": "assistant", "tool_calls": [OTHER_CALL]}]},
    {"messages": [USER, {**ASSISTANT, "thinking": "hm", "weight": 1}], "id": 4},
    {"text": "a"},
    {"prompt": "a", "completion": "b"},
]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_nulls_of_columns_that_rows_share_are_nothing(kind: str, tmp_path: Path) -> None:
    columns = sorted({column for row in MIXED for column in row})
    shared = pyarrow.Table.from_pylist([{column: row.get(column) for column in columns} for row in MIXED])
    assert shared.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["zone"] is None
    path = tmp_path / "rows"
    if kind == "parquet":
        parquet.write_table(shared, path)
    else:
        datasets.Dataset(shared).save_to_disk(path)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(MIXED))
    assert list(read_rows(path)) == list(read_rows(file))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_columns_that_datasets_keeps_as_json_are_read_as_what_they_hold(kind: str, tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1], "b": None}}}]}
    rows = [
        {"messages": [USER, {**ASSISTANT, "content": 'say "Ho"'}]},
        {"messages": [{**USER, "content": [{"type": "text", "text": "Hi"}]}, call]},
    ]
    turns = {"role": datasets.Value("string"), "content": datasets.Json(), "tool_calls": datasets.Json()}
    features = datasets.Features({"messages": datasets.List(turns)})
    found = datasets.Dataset.from_list(rows, features=features)
    path = tmp_path / "rows"
    (found.to_parquet if kind == "parquet" else found.save_to_disk)(str(path))
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(rows))
    assert list(read_rows(path)) == list(read_rows(file))


def test_of_saved_splits_train_is_read_or_the_one_that_is_named(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("test", "train")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    assert source.notice is not None
    assert "of its splits test, train, train is read" in source.notice
    assert list(read_rows(tmp_path / "saved")) == [Text("train")]
    assert list(read_rows(f"{tmp_path}/saved:test")) == [Text("test")]
    assert list(read_rows(tmp_path / "saved" / "test")) == [Text("test")]
    with pytest.raises(ValueError, match="must have a split dev, got test, train"):
        open_source(f"{tmp_path}/saved:dev")


def test_a_date_that_datasets_made_of_a_string_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "When?", "completion": "2024-05-01"}\n')
    read = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    read.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"completion must be a string .*got datetime.datetime\(2024, 5, 1"):
        list(read_rows(tmp_path / "saved"))
    assert list(read_rows(file)) == [Completion("When?", "2024-05-01")]


def test_the_only_split_is_read_whatever_its_name(tmp_path: Path) -> None:
    datasets.DatasetDict({"dev": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk(tmp_path / "saved")
    assert list(read_rows(tmp_path / "saved")) == [Text("a")]


@pytest.mark.parametrize(
    ("source", "asked", "text"),
    [
        ("who/what", ("who/what", None), "train"),
        ("who/what:dev", ("who/what", None), "dev"),
        ("who/what:main:dev", ("who/what", "main"), "dev"),
    ],
)
def test_a_name_that_is_no_file_is_a_data_set_on_the_hub(
    source: str, asked: tuple[str, str | None], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(name: str, configuration: str | None) -> Any:
        calls.append((name, configuration))
        return {split: datasets.Dataset.from_list([{"text": split}]) for split in ("train", "dev")}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows(source)) == [Text(text)]
    assert calls == [asked]


def test_what_the_hub_has_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, configuration: str | None) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"who/what is not a file, and no data set .* no network"):
        open_source("who/what")


@pytest.mark.parametrize("name", ["none.jsonl", "data/none.jsonl", "none.parquet", "a/b/c", "none"])
def test_a_file_that_is_missing_is_not_sought_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        open_source(name)


def test_a_directory_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a directory that datasets saved .* name its files"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:-12], "is not a whole gzip file"),
        ("a.parquet", b"PAR1abc", "is not a Parquet file that can be read"),
        ("a.json", b'[{"text": "a"},', "must be a JSON array of rows"),
        ("a.csv", b'text\n"a', r"line 2: not CSV in UTF-8"),
        ("a.csv", b"text\n\xff\n", r"not CSV in UTF-8"),
        ("a.csv", b"text,id\na\n", r"line 2: a row must have 2 columns, .* got 1"),
        ("a.csv", b"text,text\na,b\n", "columns must have different names"),
        ("a.json", b"[3]", r"row 1: a row must be a JSON object, got 3"),
        ("a.jsonl.bz2", bz2.compress(lines(ROWS)), r"is compressed by bzip2; of such files gzip's are read"),
        ("a.jsonl.xz", lzma.compress(lines(ROWS)), r"is compressed by xz"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdabc", r"is compressed by zstd"),
        ("a.zip", b"PK\x03\x04abc", r"is compressed by zip"),
    ],
)
def test_broken_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        list(read_rows(tmp_path / name))


def test_a_row_with_other_columns_can_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id\na,1\nb\nc,3\n")
    found = read_examples(tmp_path / "a.csv", load_tokenizer(TINY), max_length=8, bad_rows="skip")
    assert (len(found.examples), found.skipped_bad) == (2, 1)


def test_a_column_without_a_name_is_ignored_in_words(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",text\n0,a\n")  # as pandas writes its index
    found = read_examples(tmp_path / "a.csv", load_tokenizer(TINY), max_length=8)
    assert found.notices[1] == f"{tmp_path / 'a.csv'}: ignored: ''"


def test_a_csvs_cells_may_be_long(tmp_path: Path) -> None:
    path = table(tmp_path / "rows.csv", [{"text": "a" * 200_000}])
    assert list(read_rows(path)) == [Text("a" * 200_000)]


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_what_a_format_needs_is_named(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "parquet" if module == "pyarrow" else "saved")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs the packages datasets and pyarrow: pip install \"jmoe\[data\]\""):
        list(read_rows(path))


@pytest.mark.parametrize("packed", [False, True])
def test_a_pipe_is_read_as_a_file_is(tmp_path: Path, packed: bool) -> None:
    """As the shell's --data <(command) gives one."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = b'{"text": "one"}\n{"text": "two"}\n'
    writer = threading.Thread(target=pipe.write_bytes, args=[gzip.compress(content) if packed else content])
    writer.start()
    records = [record.content for record in open_source(pipe).records]
    writer.join()
    assert records == content.splitlines()
