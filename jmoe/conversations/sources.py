"""Where rows are: files of JSON lines, JSON, CSV and Parquet, directories that `datasets` saved, and the Hub."""

import codecs
import csv
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from jmoe.conversations.turns import once

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
"""What such files begin with."""

UNREAD = {b"BZh": "bzip2", b"\xfd7zX": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
"""What files begin with that other programs compressed."""

TABLES = {".csv": ",", ".tsv": "\t"}
"""What separates the columns of a text file, by its name's ending."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
DATA_ENDINGS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".gz", ".txt", ".arrow")

MISSING = 'reading {} needs the packages datasets and pyarrow: pip install "jmoe[data]"'


class Record(NamedTuple):
    """One row as it stands in its source, and where: the file and the line's or the row's number, from 1.

    Fields:
      content: a line of JSON, or values by column, or what is wrong with the row.
    """

    place: str
    content: bytes | Mapping[str, Any] | ValueError


class Source(NamedTuple):
    """The records of one source, and what its user should know of how it is read."""

    records: Iterator[Record]
    notice: str | None = None


def open_source(source: str | os.PathLike[str]) -> Source:
    """A file or pipe, a pattern of files, a directory that `datasets` saved, or a data set on the Hub.

    A directory or a data set with several splits is followed by the one to read, as in owner/name:validation, a data
    set with several configurations by both, as in owner/name:main:train. Otherwise the split is train.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it cannot be read, or no split is train; it is a directory of another kind. A file that turns out
        to be broken raises while its records are read.
      ImportError: it needs the packages datasets and pyarrow, which are not installed.
    """
    text = os.fspath(source)
    path = Path(text)
    if path.is_file() or path.is_fifo():
        return Source(_file_records(path))
    if path.is_dir():
        return _open_directory(path, None)
    directory, _, split = text.rpartition(":")
    if directory and Path(directory).is_dir():
        return _open_directory(Path(directory), split)
    if files := sorted(filter(os.path.isfile, glob(text, recursive=True))):
        return Source(itertools.chain.from_iterable(_file_records(Path(file)) for file in files))
    if HUB_NAME.fullmatch(text) and not text.endswith(DATA_ENDINGS):
        return _open_hub(text)
    raise FileNotFoundError(f"{text} does not exist, or is not a file")


def _file_records(path: Path) -> Iterator[Record]:
    piped = path.read_bytes() if path.is_fifo() else None  # which can be read once
    with path.open("rb") if piped is None else io.BytesIO(piped) as file:
        begin = file.read(len(PARQUET))
    for magic, program in UNREAD.items():
        if begin.startswith(magic):
            raise ValueError(f"{path} is compressed by {program}; of such files gzip's are read")
    if begin == PARQUET:
        if piped is not None:
            raise ValueError(f"{path} is a pipe with Parquet, which must be in a file")
        yield from _parquet_records(path)
        return
    packed = begin.startswith(GZIP)
    ending = Path(path.stem).suffix if packed and path.suffix.lower() == ".gz" else path.suffix
    try:
        whole: Any = path if piped is None else io.BytesIO(piped)
        with gzip.open(whole, "rb") if packed else whole if piped is not None else path.open("rb") as text:
            yield from _text_records(path, ending.lower(), text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def _text_records(path: Path, ending: str, file: Any) -> Iterator[Record]:
    if ending in TABLES:
        yield from _table_records(path, TABLES[ending], file)
        return
    first = file.readline().removeprefix(codecs.BOM_UTF8)
    if ending == ".json" and first.lstrip().startswith(b"["):
        yield from _array_records(path, first + file.read())
        return
    for number, line in enumerate(itertools.chain([first], file), start=1):
        if content := line.strip():
            yield Record(f"{path}, line {number}", content)


def _array_records(path: Path, content: bytes) -> Iterator[Record]:
    """The rows of a file that is one JSON array."""
    try:
        rows = json.loads(content, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON array of rows, or have one row a line: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield Record(f"{path}, row {number}", row if isinstance(row, dict) else json.dumps(row).encode())


def _table_records(path: Path, separator: str, file: Any) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), min(sys.maxsize, 2**31 - 1)))  # its default is 131072 characters
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=separator, strict=True)
        line = 1
        try:
            columns = next(reader, [])
            if len(set(columns)) < len(columns):
                raise ValueError(f"{path}, line 1: columns must have different names, got {columns}")
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield Record(f"{path}, line {line}", _by_column(columns, cells))
                line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {line}: not CSV in UTF-8: {error}") from error


def _by_column(columns: list[str], cells: list[str]) -> Mapping[str, Any] | ValueError:
    if len(cells) != len(columns):
        return ValueError(f"a row must have {len(columns)} columns, as the first line has, got {len(cells)}")
    return {column: cell or None for column, cell in zip(columns, cells, strict=True)}


def _parquet_records(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(MISSING.format(path)) from error
    try:
        with parquet.ParquetFile(path) as file:
            yield from _arrow_records(str(path), file.iter_batches(batch_size=256))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file that can be read: {error}") from error


def _arrow_records(name: str, batches: Iterable[Any]) -> Iterator[Record]:
    """The rows of batches of Arrow's, in which a value that is missing and a null are the same."""
    number = 0
    for batch in batches:
        read = _object_reader([(field.name, _reader(field.type)) for field in batch.schema])
        for row in batch.to_pylist():
            number += 1
            try:
                content = read(row)
            except (ValueError, RecursionError) as error:
                content = ValueError(f"a row must hold JSON where its columns say so: {error}")
            yield Record(f"{name}, row {number}", content)


type Reader = Callable[[Any], Any]


def _reader(kind: Any) -> Reader:
    """What reads a value of an Arrow type: objects without their nulls, JSON as what it holds.

    Objects of a column share their keys, with nulls where one lacks them. `datasets` keeps as JSON what is of another
    kind in another row: texts among lists of parts, calls with other arguments.
    """
    from pyarrow import types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return lambda text: json.loads(text, object_pairs_hook=once)
    if types.is_struct(kind):
        return _object_reader([(kind.field(i).name, _reader(kind.field(i).type)) for i in range(kind.num_fields)])
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        read = _reader(kind.value_type)
        return lambda values: [None if value is None else read(value) for value in values]
    return lambda value: value


def _object_reader(fields: list[tuple[str, Reader]]) -> Reader:
    return lambda value: {name: read(value[name]) for name, read in fields if value[name] is not None}


def _open_directory(path: Path, split: str | None) -> Source:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise ValueError(
            f"{path} is not a directory that datasets saved (save_to_disk): name its files, or a pattern in quotes, as "
            f"'{path}/*.jsonl'"
        )
    datasets = _import_datasets(path)
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the files of a directory that is damaged raise
        raise ValueError(f"{path} is not a directory that datasets can read: {error}") from error
    return _of_dataset(str(path), found, split)


def _open_hub(text: str) -> Source:
    name, *parts = text.split(":")
    configuration = parts[0] if len(parts) == 2 else None
    datasets = _import_datasets(text)
    try:
        found = datasets.load_dataset(name, configuration)
    except Exception as error:  # of the network, of the Hub, of the files that it has
        raise ValueError(f"{name} is not a file, and no data set of the Hub that can be read: {error}") from error
    return _of_dataset(name, found, parts[-1] if parts else None)


def _of_dataset(name: str, found: Any, split: str | None) -> Source:
    notice = None
    if isinstance(found, Mapping):
        splits = list(found)
        wanted = split or (splits[0] if len(splits) == 1 else "train")
        if wanted not in splits:
            raise ValueError(
                f"{name} must have a split {wanted}, got {', '.join(splits)}: name one, as in {name}:SPLIT"
            )
        if split is None and len(splits) > 1:
            notice = f"{name}: of its splits {', '.join(splits)}, {wanted} is read; {name}:SPLIT reads another"
        found, name = found[wanted], f"{name}:{wanted}"
    elif split is not None:
        raise ValueError(f"{name} has no splits, got {name}:{split}")
    return Source(_arrow_records(name, found.with_format("arrow").iter(batch_size=256)), notice)


def _import_datasets(name: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(MISSING.format(name)) from error
    return datasets
