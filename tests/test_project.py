"""The project as a whole: who may import whom, what is public, what the documents promise."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import jmoe

ROOT = Path(__file__).parent.parent

PUBLIC = {
    "Experts",
    "Lora",
    "Mxfp4",
    "PackedMxfp4",
    "Routing",
    "SiluAndMul",
    "SwiGLU",
    "Target",
    "allow_triton_call",
    "dequantize",
    "moe",
    "pack",
    "quantize",
    "route",
    "unpack",
}


class Import(NamedTuple):
    """One import in a source file."""

    file: str
    module: str
    inside_function: bool


def imports(folder: str) -> Iterator[Import]:
    """Every import in a folder's files, links not followed, those under `if TYPE_CHECKING` left out."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if folder == "jmoe" and file.startswith(("jmoe/triton_src/", "jmoe/interop/")):
            continue
        yield from walk(file, ast.parse(path.read_text()), inside=False)


def walk(file: str, node: ast.AST, inside: bool) -> Iterator[Import]:
    """The imports under a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (Import(file, alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{file}: relative import"
            # With the name, as `from jmoe import interop` imports jmoe.interop.
            yield from (Import(file, f"{child.module}.{alias.name}", inside) for alias in child.names)
        yield from walk(file, child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def starts(module: str, *packages: str) -> bool:
    """Whether the module is one of the packages or lies in it."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def test_triton_src_imports_triton_and_the_standard_library_alone() -> None:
    for found in imports("triton_src"):
        allowed = (
            starts(found.module, "triton", "jmoe.triton_src") or found.module.split(".")[0] in sys.stdlib_module_names
        )
        assert allowed, found


PEERS = "jmoe/bench/peers/"
"""What jmoe is measured beside: the one room in jmoe, but for the links, that is of torch."""


def test_jmoe_imports_neither_torch_nor_the_torch_side() -> None:
    for found in imports("jmoe"):
        if not found.file.startswith(PEERS) and starts(found.module, "torch", "jmoe.interop", "jmoe.bench.peers"):
            assert starts(found.file.replace("/", ".").removesuffix(".py"), "jmoe.commands", "jmoe.bench"), found
            assert found.inside_function, found


def test_peers_are_torch_and_what_is_measured() -> None:
    for found in imports(PEERS.removesuffix("/")):
        packages = ["torch", "jmoe.interop", "jmoe.bench.peers", "jmoe.triton_src.activation"]
        packages += ["triton_kernels"] * (found.file == PEERS + "triton_kernels.py")
        packages += ["vllm"] * (found.file == PEERS + "vllm_lora.py")
        assert starts(found.module, *packages) or found.module.split(".")[0] in sys.stdlib_module_names, found


TUNING = ("jmoe/bench/tune.py", "jmoe/commands/tune.py")
"""What writes a user's launch parameters; they are data, and the files that hold their form import no triton."""

TABLES = ("jmoe.triton_src.tile_tables", "jmoe.triton_src.tile_candidates")


def test_triton_has_one_door() -> None:
    for found in imports("jmoe"):
        if starts(found.module, "jax_triton", "triton", "jmoe.triton_src"):
            if starts(found.module, "jmoe.triton_src.activation"):
                continue  # everybody's value, in a file that imports the standard library alone
            tables = starts(found.module, *TABLES) and found.file in TUNING
            assert found.file.startswith("jmoe/ops/launch/") or tables, found
            assert found.inside_function, found


def test_operations_do_not_know_what_is_built_on_them() -> None:
    for found in imports("jmoe"):
        if found.file.startswith("jmoe/ops/"):
            allowed = not starts(found.module, "flax", "jmoe") or starts(found.module, "jmoe.ops", "jmoe.triton_src")
            assert allowed, found


def test_the_torch_side_meets_jax_in_two_files() -> None:
    for found in imports("interop"):
        packages = ["torch", "triton", "numpy", "jax", "jmoe"]
        assert starts(found.module, *packages) or found.module.split(".")[0] in sys.stdlib_module_names, found
        if starts(found.module, "jax"):
            assert found.file in ("interop/dlpack.py", "interop/parity.py"), found
        if starts(found.module, "jmoe"):
            rooms = ["jmoe.interop", "jmoe.triton_src"]
            rooms += ["jmoe.ops", "jmoe.bench.peers"] * (found.file == "interop/parity.py")
            assert starts(found.module, *rooms), found


def test_public_names() -> None:
    assert set(jmoe.__all__) == PUBLIC
    assert all(hasattr(jmoe, name) for name in PUBLIC)


def test_public_names_of_the_torch_side() -> None:
    from jmoe import interop

    assert set(interop.__all__) == {"moe", "to_jax", "to_torch"}
    assert all(callable(getattr(interop, name)) for name in interop.__all__)


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton", "jax_triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""

USE = """
import jax, jax.numpy as jnp, jmoe
w = lambda n, k: jmoe.quantize(jax.random.normal(jax.random.key(n), (4, n, k)))
experts = jmoe.Experts(w(128, 32), None, w(32, 64), None)
x, logits = jnp.ones((3, 32), jnp.bfloat16), jnp.eye(3, 4)
for backend in ("xla", None):
    y = jax.jit(lambda x: jmoe.moe(x, logits, experts, top_k=2, backend=backend))(x)
    assert y.shape == (3, 32) and bool(jnp.isfinite(y).all())
try:
    jax.jit(lambda x: jmoe.moe(x, logits, experts, top_k=2, backend=jmoe.Target("sm_90"))).trace(x).lower(
        lowering_platforms=("cuda",))
except ImportError as error:
    print(error)
"""


def test_jmoe_works_without_torch_and_triton() -> None:
    run = subprocess.run([sys.executable, "-c", BLOCKER + USE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    # Only their modules are hidden here, so what is missed is the import; a bare environment misses the package.
    assert "No module named" in run.stdout


def test_import_leaves_torch_and_triton_alone() -> None:
    program = "import sys, jmoe; print(*{'torch', 'triton', 'jax_triton'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.bare_env
def test_jmoe_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    # A copy, as setuptools builds in place and puts what an earlier build left there into the next wheel.
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", source]
    subprocess.run(install, check=True, stdin=subprocess.DEVNULL)
    use = "import sys, importlib.util as u\nassert not any(map(u.find_spec, ('torch', 'triton', 'jax_triton')))\n" + USE
    # The rooms that lie beside jmoe are in the wheel; looked for as files, since importing jmoe.interop takes torch.
    use += "import pathlib\nhome = pathlib.Path(jmoe.__file__).parent\n"
    use += "assert all((home / name).is_file() for name in ('triton_src/tables/default.json', 'interop/dlpack.py'))\n"
    run = subprocess.run([python, "-c", use], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("the Triton backend needs jax-triton >= 0.4.1, which is not installed: pip install")


def import_seconds(modules: str) -> float:
    """The processor's time in the quickest of three fresh processes: a clock's has what else the machine does in it."""
    program = f"import time; import {modules}; print(time.process_time())"
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    return min(float(run.stdout) for run in runs)


def test_import_takes_no_longer_than_jax_and_flax() -> None:
    # A tenth and 50 ms are what such a measurement varies by.
    assert import_seconds("jmoe") <= 1.1 * import_seconds("jax, flax") + 0.05


def test_files_can_be_read_whole() -> None:
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "*.py"], capture_output=True, text=True, check=True)
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in tracked.stdout.split() if "/" in name}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_readme_names_real_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^    |`)make ([a-z]+)\b", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_make_without_python_says_so_in_one_line(tmp_path: Path) -> None:
    for tool in ("make", "sh"):
        found = shutil.which(tool)
        assert found is not None, f"{tool} is missing"
        (tmp_path / tool).symlink_to(found)
    for target in ("demo", "test"):
        run = subprocess.run(
            ["make", target, f"VENV={tmp_path / 'venv'}"],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={"PATH": str(tmp_path)},
        )
        assert (run.returncode, run.stdout) == (1, "")
        assert re.fullmatch(r"jmoe needs Python 3\.12 or later.*\n", run.stderr)


def test_readme_example_runs() -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False, cwd=ROOT)
        assert run.returncode == 0, run.stderr


def test_readme_commands_run(tmp_path: Path) -> None:
    (commands,) = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tool = Path(sys.executable).with_name("jmoe")
    for command in commands.splitlines():
        words = shlex.split(command)
        assert words[0] == "jmoe"
        run = subprocess.run([tool, *words[1:]], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
        if words[1] == "eval":  # base, then with the adapter; another processor's rounding may cost some of it
            base, adapted, *_ = (float(value) for value in re.findall(r"([+-]?\d\.\d{4}) ±", run.stdout))
            assert adapted >= max(0.8, base + 0.25), run.stdout


def test_readme_tables_are_those_of_the_committed_figures() -> None:
    from jmoe.bench import readme

    text = (ROOT / "README.md").read_text()
    assert readme.render(text) == text


def test_extras_agree_with_what_the_door_demands() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"jax-triton>=0.4.1", "triton>=3.7"} <= set(extras["cuda13"])
