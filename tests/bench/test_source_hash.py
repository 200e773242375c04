"""Hashes of what was measured, and the results that they show to be stale."""

import json
import re
import warnings
from pathlib import Path

import pytest

from jmoe.bench import readme
from jmoe.bench.source_hash import LAYER, MODEL, PARITY, ROOT, hash_of, source_hash

CODE = '"""A docstring."""\nROWS = 4\n"""What it is."""\n\n\ndef double(x: int) -> int:\n    return 2 * x\n'


def test_comments_docstrings_and_lines_do_not_count() -> None:
    commented = CODE.replace("A docstring", "Another").replace(
        "    return", '    """Twice."""\n    # why\n\n    return'
    )
    assert hash_of({"a.py": CODE}) == hash_of({"a.py": commented, "empty.py": '"""Nothing."""\n'})


@pytest.mark.parametrize(("old", "new"), [("4", "8"), ("2 * x", "x * 2"), ("double", "twice"), ("2 * x", "2 * 'x'")])
def test_all_else_counts(old: str, new: str) -> None:
    assert hash_of({"a.py": CODE}) != hash_of({"a.py": CODE.replace(old, new)})


def test_a_files_name_and_tables_in_json_count() -> None:
    code, table = {"a.py": CODE}, {"tables/gpu.json": '{"rows": 1, "warps": 4}'}
    assert len({hash_of(code), hash_of({"b.py": CODE}), hash_of(code | table)}) == 3
    assert hash_of(table) == hash_of({"tables/gpu.json": '{"warps":4,\n "rows":1}'})


def test_a_place_is_a_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "kernels" / "packed").mkdir(parents=True)
    (tmp_path / "kernels" / "packed" / "decode.py").write_text(CODE)
    (tmp_path / "kernels" / "notes.txt").write_text("not code")
    expected = hash_of({"kernels/packed/decode.py": CODE})
    assert source_hash(["kernels"], tmp_path) == expected
    assert source_hash(["kernels/packed/decode.py"], tmp_path) == expected
    with pytest.raises(FileNotFoundError, match="plans does not exist"):
        source_hash(["kernels", "plans"], tmp_path)


def test_kernels_are_in_every_hash() -> None:
    """Through the links in the package, too."""
    for places in (LAYER, PARITY, MODEL):
        assert "jmoe/triton_src" in places
    assert source_hash(["jmoe/triton_src"]) != source_hash([])


def test_every_committed_result_is_shown_by_readme_and_names_its_source() -> None:
    files = sorted(readme.RESULTS.glob("*.json"))
    assert files
    assert set(files) <= {section.file for section in readme.SECTIONS.values()}
    for file in (*files, *(ROOT / "examples" / "learning").glob("*.json")):
        assert re.fullmatch("[0-9a-f]{16}", json.loads(file.read_text())["source_hash"]), file


@pytest.mark.filterwarnings("default:stale")
def test_documents_mark_the_stale_results_and_no_others() -> None:
    """The stale ones are listed as warnings: only a mark that is wrong fails. python -m jmoe.bench.readme mends it."""
    text = "".join((ROOT / document).read_text() for document in readme.DOCUMENTS)
    for name, section in readme.SECTIONS.items():
        if section.file.exists():
            results = json.loads(section.file.read_text())
            stale = results["source_hash"] != source_hash(section.measured)
            shown = text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
            assert ("the kernels have changed since" in shown) is stale, name
            if stale:
                warnings.warn(f"stale: {section.file.name} is of {readme.commit_of(results)}", stacklevel=1)


def test_stale_results_and_ones_without_a_hash_are_marked() -> None:
    results = {"date": "d", "commit": "abc", "source_hash": source_hash(LAYER), "device": "GPU", "versions": {}}
    assert readme.mark(results, LAYER) == ""
    expected = " **Measured at commit abc: the kernels have changed since.**"
    assert readme.mark({**results, "source_hash": "0" * 16}, LAYER) == expected
    del results["source_hash"]
    assert readme.mark(results, LAYER) == expected


def test_results_from_outside_a_checkout_are_of_a_source_instead_of_a_commit() -> None:
    results = {"date": "d", "commit": None, "source_hash": "0" * 16, "device": "GPU", "versions": {"jax": "1"}}
    assert readme.source(results, "jmoe bench") == "`jmoe bench` on GPU, d, source 0000000000000000; jax 1."
