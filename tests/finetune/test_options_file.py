"""Files of options: TOML, YAML and JSON, an example of one, and what is wrong with others."""

from pathlib import Path

import pytest

from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.options_file import EXAMPLES, Format, read_file, write_example


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_yaml_has_the_options_of_toml(tmp_path: Path) -> None:
    toml = 'model = "m"\ndata = ["a", "b"]\nout = "o"\nlearning_rate = 2e-4\nranks = {gate_up = 8, q = 16}\n'
    toml += "rslora = true\n"
    yaml = "model: m\ndata:\n  - a\n  - b\nout: o\nlearning_rate: 2e-4\nranks:\n  gate_up: 8\n  q: 16\nrslora: true\n"
    entries = read_file(written(tmp_path, "run.toml", toml))
    assert entries == read_file(written(tmp_path, "run.yaml", yaml)) == read_file(written(tmp_path, "run.YML", yaml))
    assert FinetuneConfig.create(entries).learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("010", 10),
        ("0x10", 16),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-11-30", "2026-11-30"),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("-3", -3),
        ("-.inf", float("-inf")),
        ("'12'", "12"),
        ("[a, 1]", ["a", 1]),
        ("&x [a]", ["a"]),
    ],
)
def test_plain_yaml_values_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    assert read_file(written(tmp_path, "run.yaml", f"out: {text}\n")) == {"out": value}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "rank: 4\nrank: 8\n", "'rank' is there twice"),
        ("a.json", '{"rank": 4, "rank": 8}', "'rank' is there twice"),
        ("a.toml", "rank = 4\nrank = 8\n", "is not TOML: Cannot overwrite a value"),
        ("a.yaml", "rank: !!python/object/apply:os.system [ls]\n", "tags as .* have no meaning here, in line 1"),
        ("a.yaml", "rank: !!int a\n", "tags as"),
        ("a.yaml", "a: 1\n--- \nb: 2\n", "expected a single document"),
        ("a.yaml", "1: 2\n", "names must be texts, in line 1"),
        ("a.yaml", "? [a]\n: 2\n", "names must be texts, in line 1"),
        ("a.yaml", "a: &x [*x]\n", "is not YAML"),
        ("a.yaml", "a: *x\n", "is not YAML: found undefined alias"),
        ("a.yaml", "a: [\n", "is not YAML"),
        ("a.yaml", "a: \x07\n", "is not YAML"),
        ("a.yaml", "just words\n", "must hold names and values, got str"),
        ("a.yaml", "", "must hold names and values, got NoneType"),
        ("a.yaml", "a: " + "[" * 1200 + "]" * 1200, "nested too deeply"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.toml", f"rank = {'1' * 5000}", "is not TOML: Exceeds the limit"),
        ("a.yaml", f"rank: {'1' * 5000}", "is not YAML: Exceeds the limit"),
        ("a.toml", b"out = '\xff'", "is not TOML: 'utf-8' codec"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_file(written(tmp_path, name, content))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_would_be_endless_is_cut_where_it_is_shown(tmp_path: Path) -> None:
    levels = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 20))
    entries = read_file(written(tmp_path, "run.yaml", f"x0: &x0 [a]\n{levels}"))
    with pytest.raises(ValueError, match="data must be a text or a list of texts") as caught:
        FinetuneConfig.create({"model": "m", "out": "o", "data": entries["x19"]})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["toml", "yaml"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rank": 4, "ranks": {"q": 2}, "data": ["a", "b"], "validation": "v", "steps": 3, "learning_rate": 1e-5},
        {"out": 'a "b" \\ \n\t\x7f\x85\u2028 \N{GRINNING FACE} ä # no', "rslora": True, "targets": ["q", "k"]},
        {"adapter": "dir", "lora_b_layout": "rank_major"},
    ],
)
def test_the_example_reads_back_as_what_was_given(tmp_path: Path, kind: Format, given: dict[str, object]) -> None:
    text = write_example(given, kind)
    entries = read_file(written(tmp_path, f"run.{kind}", text))
    assert FinetuneConfig.create(entries) == FinetuneConfig.create(EXAMPLES | given)
    for name in FinetuneConfig.__dataclass_fields__:
        assert f"{name} =" in text or f"{name}:" in text


def test_a_windows_file_is_read(tmp_path: Path) -> None:
    assert read_file(written(tmp_path, "a.toml", b"\xef\xbb\xbfrank = 4\r\nseed = 1\r\n")) == {"rank": 4, "seed": 1}
