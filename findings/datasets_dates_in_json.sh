#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1: load_dataset("json") of a file whose strings in one column all look like ISO dates or times
# gives that column the type timestamp[s], and its values are datetime objects: a completion "2024-05-01" is read as
# datetime(2024, 5, 1, 0, 0). One other string in the column, and all stay strings. Asking for strings by features= does not help:
# the dates are read first and cast then, and "2024-05-01" has become "2024-05-01 00:00:00".
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install datasets==5.2.0 pyarrow==26.0.1
HF_HOME=$dir/home HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - "$dir" <<'PY'
import datetime
import json
import sys
from pathlib import Path

import datasets

datasets.disable_progress_bars()
here = Path(sys.argv[1])


def read(completions, **options):
    file = here / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "When?", "completion": text}) + "\n" for text in completions))
    found = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(here / "cache"), **options)
    print(found.features["completion"], found["completion"][:])
    return found.features["completion"].dtype, found["completion"][0]


strings = datasets.Features({"prompt": datasets.Value("string"), "completion": datasets.Value("string")})
assert read(["2024-05-01", "2024-05-01T10:00:00"]) == ("timestamp[s]", datetime.datetime(2024, 5, 1))
assert read(["2024-05-01", "in May"]) == ("string", "2024-05-01")
assert read(["2024-05-01", "2024-05-02"], features=strings) == ("string", "2024-05-01 00:00:00")
PY
