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
from packaging.requirements import Requirement

import jmoe
from jmoe.ops.launch.installed import OLDEST
from tests.compiled_programs import optimised

ROOT = Path(__file__).parent.parent


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


TORCH_INSIDE_FUNCTIONS = ("jmoe.commands", "jmoe.bench", "jmoe.conformance")
"""What meets the torch side where it is called."""


def test_jmoe_imports_neither_torch_nor_the_torch_side() -> None:
    for found in imports("jmoe"):
        if not found.file.startswith(PEERS) and starts(found.module, "torch", "jmoe.interop", "jmoe.bench.peers"):
            assert starts(found.file.replace("/", ".").removesuffix(".py"), *TORCH_INSIDE_FUNCTIONS), found
            assert found.inside_function, found


def test_peers_are_torch_and_what_is_measured() -> None:
    for found in imports(PEERS.removesuffix("/")):
        packages = ["torch", "jmoe.interop", "jmoe.triton_src", "jmoe.bench.peers"]
        packages += ["triton_kernels"] * (found.file == PEERS + "triton_kernels.py")
        packages += ["vllm"] * (found.file == PEERS + "vllm_lora.py")
        assert starts(found.module, *packages) or found.module.split(".")[0] in sys.stdlib_module_names, found


TUNING = ("jmoe/bench/tune.py", "jmoe/commands/tune.py")
"""What writes a user's launch parameters; they are data, and the files that hold their form import no triton."""

TABLES = ("jmoe.triton_src.tile_tables", "jmoe.triton_src.tile_candidates")


def test_triton_has_one_door() -> None:
    for found in imports("jmoe"):
        if starts(found.module, "jax_triton", "triton", "jmoe.triton_src"):
            if starts(found.module, "jmoe.triton_src.activation", "jmoe.triton_src.scoring"):
                continue  # values for everybody, in files that import the standard library alone
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


def documented_names() -> list[str]:
    """The names in the list that the package's docstring is."""
    lines = re.findall(r"^    ((?:\w+, )*\w+)  ", jmoe.__doc__ or "", re.MULTILINE)
    return sorted(name for line in lines for name in line.split(", "))


def names_for_type_checkers() -> list[str]:
    """The names that the package imports under `if TYPE_CHECKING`."""
    tree = ast.parse((ROOT / "jmoe" / "__init__.py").read_text())
    (block,) = (each for each in tree.body if isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING")
    return sorted(alias.asname or alias.name for each in ast.walk(block) for alias in getattr(each, "names", []))


def test_public_names_are_the_documented_ones() -> None:
    documented = documented_names()
    assert documented == sorted(jmoe.__all__) == sorted(jmoe.HOME) == names_for_type_checkers()
    assert [name for name in dir(jmoe) if not name.startswith("_")] == sorted([*documented, *jmoe.ROOMS])
    for name in documented:
        public = getattr(jmoe, name)
        assert (public.__module__, public.__name__) == (jmoe.HOME[name], name)
        assert public.__doc__


def test_public_names_of_the_torch_side() -> None:
    from jmoe import interop

    assert set(interop.__all__) == {"moe", "to_jax", "to_torch"}
    assert all(callable(getattr(interop, name)) for name in interop.__all__)


HIDDEN = (
    "flax",
    "jax_triton",
    "optax",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "typer",
)
"""Of what `pip install jmoe` does not bring."""

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


PARTS = """
import jmoe.__main__
for part in ("nn", "gpt_oss", "adapters"):
    try:
        getattr(jmoe, part)
    except ImportError as error:
        print(error)
with tempfile.NamedTemporaryFile() as file:
    try:
        with jmoe.checkpoint.directory.open_safetensors(pathlib.Path(file.name)):
            pass
    except ImportError as error:
        print(error)
jmoe.__main__.main()
"""

SAID = (
    'jmoe.nn needs flax, which is not installed: pip install "jmoe[nn]"\n'
    'jmoe.gpt_oss needs flax, which is not installed: pip install "jmoe[model]"\n'
    'jmoe.adapters needs safetensors, which is not installed: pip install "jmoe[model]"\n'
    'reading checkpoints needs safetensors, which is not installed: pip install "jmoe[model]"\n'
)

COMMAND_SAID = 'jmoe: the command jmoe needs typer, which is not installed: pip install "jmoe[cli]"\n'


def test_jmoe_works_without_what_its_extras_bring() -> None:
    # A module that is None cannot be imported. As only modules are hidden, the Triton backend misses its import, and in
    # a bare environment the package.
    hide = f"import pathlib, sys, tempfile\nsys.modules.update(dict.fromkeys({HIDDEN}))\n"
    program = [sys.executable, "-c", hide + USE + PARTS]
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    assert "Traceback" not in run.stderr, run.stderr
    missed, said = run.stdout.split("\n", 1)
    assert "triton" in missed
    assert said == SAID
    assert run.returncode == 1
    assert run.stderr == COMMAND_SAID


def test_the_layer_imports_none_of_what_extras_bring() -> None:
    program = f"import sys, jmoe; jmoe.moe; jmoe.Experts; print(*{set(HIDDEN)} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.slow
@pytest.mark.bare_env
def test_jmoe_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    # A copy, as setuptools builds in place and puts what an earlier build left there into the next wheel.
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", source]
    subprocess.run(install, check=True, stdin=subprocess.DEVNULL)
    use = f"import pathlib, tempfile, importlib.util as u\nassert not any(map(u.find_spec, {HIDDEN}))\n" + USE
    # The rooms that lie beside jmoe are in the wheel; looked for as files, since importing jmoe.interop takes torch.
    use += "home = pathlib.Path(jmoe.__file__).parent\n"
    files = ("triton_src/tables/default.json", "interop/dlpack.py", "py.typed")
    use += f"assert all((home / name).is_file() for name in {files})\n"
    use += "import importlib.metadata\nassert importlib.metadata.version('jmoe') == jmoe.__version__\n"
    run = subprocess.run([python, "-c", use + PARTS], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "Traceback" not in run.stderr, run.stderr
    missed, said = run.stdout.split("\n", 1)
    assert missed.startswith("the Triton backend needs jax-triton >= 0.4.1, < 0.5, which is not installed: pip install")
    assert said == SAID
    command = subprocess.run([python.with_name("jmoe"), "doctor"], capture_output=True, text=True, check=False)
    assert (command.returncode, command.stdout, command.stderr) == (1, "", COMMAND_SAID)


def test_files_can_be_read_whole() -> None:
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "*.py"], capture_output=True, text=True, check=True)
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in tracked.stdout.split() if "/" in name}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_documents_and_workflows_name_real_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        document: set(re.findall(r"(?:^    |`|- run: )make ([a-z-]+)\b", text.read_text(), re.MULTILINE))
        for document in ("README.md", "CONTRIBUTING.md", *(f".github/workflows/{name}.yml" for name in WORKFLOWS))
        for text in [ROOT / document]
    }
    assert {"demo", "test"} <= named["README.md"]
    assert all(names and names <= targets for names in named.values()), named


WORKFLOWS = ("lint", "tests", "docs")


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


EXAMPLES = [
    (path.name, example)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for example in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
]


@pytest.mark.slow
@pytest.mark.parametrize(("document", "example"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_the_documents_examples_run(document: str, example: str) -> None:
    run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_readme_has_an_example_of_the_layer_and_of_the_model() -> None:
    layer, model = (example for document, example in EXAMPLES if document == "README.md")
    assert "jmoe.moe(" in layer
    assert "gpt_oss.load(" in model


@pytest.mark.slow
def test_readme_commands_run(tmp_path: Path) -> None:
    (commands,) = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tool = Path(sys.executable).with_name("jmoe")
    for command in commands.splitlines():
        words = shlex.split(command)
        assert words[0] == "jmoe"
        run = subprocess.run(
            [tool, *words[1:]], capture_output=True, text=True, check=False, cwd=tmp_path, env=optimised()
        )
        assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
        if words[1] == "eval":  # base, then with the adapter; another processor's rounding may cost some of it
            base, adapted, *_ = (float(value) for value in re.findall(r"([+-]?\d\.\d{4}) ±", run.stdout))
            assert adapted >= max(0.8, base + 0.25), run.stdout


def test_tables_are_those_of_the_committed_figures() -> None:
    from jmoe.bench import readme

    assert {name for sections in readme.DOCUMENTS.values() for name in sections} == readme.SECTIONS.keys()
    for document, sections in readme.DOCUMENTS.items():
        text = (ROOT / document).read_text()
        assert readme.render(text, sections) == text, f"{document}: python -m jmoe.bench.readme"


def test_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_extras_agree_with_what_the_door_demands() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {package: ".".join(map(str, oldest)) for package, oldest in OLDEST.items()}
    found = [Requirement(text) for extra in ("cuda13", "torch", "dev") for text in extras[extra]]
    floors = {
        (requirement.name, bound.version)
        for requirement in found
        if requirement.name in wanted
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    assert floors == set(wanted.items())
    assert wanted.keys() <= {Requirement(text).name for text in extras["cuda13"]}
