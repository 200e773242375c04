"""The docs site: it builds without a warning, and its reference has every public name."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    page: re.findall(r"^::: (jmoe(?:\.\w+)?)$", (ROOT / f"docs/reference/{page}.md").read_text(), re.MULTILINE)
    for page in ("jmoe", "nn", "gpt_oss", "checkpoint", "adapters", "text", "interop")
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    return out


@pytest.mark.parametrize("page", PACKAGES)
def test_every_public_name_has_an_entry(site: Path, page: str) -> None:
    (package,) = PACKAGES[page]
    text = (site / "reference" / page / "index.html").read_text()
    there = set(re.findall(r'<h\d id="([\w.]+)"', text)) | set(re.findall(r'id="([\w.]+)" class="doc', text))
    # A function that has the name of its module has an entry as that module's.
    missing = {
        name
        for name in importlib.import_module(package).__all__
        if f"{package}.{name}" not in there and f"{package}.{name}.{name}" not in there
    }
    assert missing == set()
