"""The `jmoe` command, run as a user runs it."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest
import typer
from typer.testing import CliRunner

from jmoe import __version__, cli
from jmoe.checkpoint.config_file import CheckpointWarning

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny_gpt_oss"


def jmoe(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command on a machine that shows it no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jmoe.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_parity_of_a_checkpoint_with_an_adapter(tmp_path: Path) -> None:
    out = tmp_path / "parity.json"
    adapter, text = TINY / "adapter", ROOT / "LICENSE"
    run = jmoe(
        "parity", "--checkpoint", TINY, "--adapter", adapter, "--tokens", 8, "--text", text, "--out", out
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "lowered only" in run.stdout
    assert "not run" in run.stdout
    assert "Triton ran in its interpreter; every launch compiled for sm_80, sm_90, sm_100" in run.stdout
    rows = json.loads(out.read_text())["rows"]
    assert ["adapter" in row["label"] for row in rows] == [False, True]
    for row in rows:
        assert row["failures"] == []
        assert 0 < row["xla"] <= 5e-3
        assert 0 < row["triton_torch"] <= 5e-3


@pytest.mark.slow
def test_parity_of_random_layers() -> None:
    run = jmoe("parity")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("pass") == 6


@pytest.mark.slow
def test_parity_fails_when_results_disagree() -> None:
    program = (
        "import jmoe.cli, jmoe.ops.random_layer as r\n"
        "from jmoe.interop import parity\n"
        "parity.small_shapes = lambda: [r.LayerShape(3, 64, 64, 4, 2)]\n"
        "real = parity.moe_torch\n"
        "parity.moe_torch = lambda *a, **k: real(*a, **k) * 1.01\n"
        "jmoe.cli.main()"
    )
    environment = dict(os.environ, TRITON_INTERPRET="1", JAX_PLATFORMS="cpu")
    run = subprocess.run(
        [sys.executable, "-c", program, "parity"], capture_output=True, text=True, check=False, env=environment
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "FAIL 3 tokens, 4 experts, top-2, 64/64: triton_torch is off by 1.0e-02, more than 5e-03" in run.stdout


def test_memory_that_ran_out_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def app(message: str) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(cli, "app", lambda: app("RESOURCE_EXHAUSTED: Out of memory\nmore"))
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == (
        "jmoe: memory ran out; ask for fewer or shorter sequences at once: RESOURCE_EXHAUSTED: Out of memory\n"
    )
    monkeypatch.setattr(cli, "app", lambda: app("INTERNAL: something else"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        cli.main()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RecursionError("maximum recursion depth exceeded"), "jmoe: the input is nested too deeply"),
        (
            MemoryError("Unable to allocate 48.8 GiB"),
            "jmoe: the computer's memory ran out; ask for fewer or shorter seq",
        ),
        (NotImplementedError("no such kernel"), "jmoe: no such kernel\n"),
        (NotImplementedError(), "jmoe: NotImplementedError\n"),
        (ValueError("bad input"), "jmoe: bad input\n"),
    ],
)
def test_an_error_is_one_line_and_with_debug_its_traceback(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def app() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["jmoe", "doctor"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    found = capsys.readouterr().err
    assert found.startswith(line)
    assert found.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["jmoe", "doctor", "--debug", "--", "--debug"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert sys.argv == ["jmoe", "doctor", "--", "--debug"]


@pytest.mark.parametrize(
    ("error", "status"), [(BrokenPipeError(errno.EPIPE, "Broken pipe"), 1), (KeyboardInterrupt(), 130)]
)
def test_who_stops_reading_or_presses_ctrl_c_needs_no_message(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def app() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("module", ["numpy", "typer", "transformers.utils.versions"])
def test_ctrl_c_while_modules_are_imported_is_a_line(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "jmoe", "generate", "--model", str(TINY), "Hi"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.split("|")[-1].strip() == module for line in process.stderr)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 130
    assert [line for line in rest.splitlines() if not line.startswith("import time:")] == ["jmoe: interrupted"]


def test_ctrl_c_stays_ignored_where_the_command_was_started_so() -> None:
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from jmoe import __main__; __main__.main()"
    show = f"import atexit, signal; atexit.register(lambda: print(signal.getsignal(signal.SIGINT).name)); {program}"
    run = subprocess.run([sys.executable, "-c", show, "--version"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.split()[-1]) == (0, "SIG_IGN"), run.stderr


def test_a_terminal_without_unicode_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(cli, "app", lambda: print("π"))
    cli.main()
    assert written.getvalue() == b"\\u03c0\n"


def test_python_m_jmoe_is_the_command_and_survives_a_closed_pipe() -> None:
    run = subprocess.run([sys.executable, "-m", "jmoe", "--version"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, f"jmoe {__version__}\n"), run.stderr
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "-m", "jmoe", "-h"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (run.returncode, run.stderr) == (1, b"")


def test_a_full_disk_behind_standard_output_is_named() -> None:
    command = [sys.executable, "-m", "jmoe", "--version"]
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("jmoe: [Errno 28] No space left on device: ")
    assert "standard output" in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("command", sorted(typer.main.get_command(cli.app).commands))
def test_every_command_has_help_by_two_names(command: str) -> None:
    short, long = (CliRunner().invoke(cli.app, [command, flag]) for flag in ("-h", "--help"))
    assert short.exit_code == long.exit_code == 0
    assert short.stdout == long.stdout
    assert "Usage:" in short.stdout


def test_help_marks_what_is_required_and_lists_choices() -> None:
    shown = CliRunner().invoke(cli.app, ["generate", "-h"]).stdout
    assert "[required]" in shown
    assert "low|medium|high" in shown


def test_a_command_that_is_not_there_suggests_one() -> None:
    run = CliRunner().invoke(cli.app, ["genrate"])
    assert run.exit_code == 2
    assert run.stderr == "jmoe: No such command 'genrate'. Did you mean 'generate'?\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "--model", "x"], "Missing option '--tasks'."),
        (["serve", "--model", "x", "--port", "none"], "Invalid value for '--port': "),
        (["serve", "--model", "x", "--prot", "1"], "No such option: --prot"),
        (["parity", "--adapter", "x"], "--adapter needs --checkpoint"),
    ],
)
def test_what_is_wrong_with_options_is_a_line(arguments: list[str], says: str) -> None:
    run = CliRunner().invoke(cli.app, arguments)
    (line,) = run.stderr.splitlines()
    assert (run.exit_code, run.stdout, line.startswith(f"jmoe: {says}")) == (2, "", True), line


def test_no_arguments_are_help() -> None:
    run = CliRunner().invoke(cli.app, [])
    assert "Usage:" in run.output
    assert "jmoe:" not in run.output


def test_shells_can_complete_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name, value in {"_JMOE_COMPLETE": "complete_bash", "COMP_WORDS": "jmoe gen", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        typer.main.get_command(cli.app).main(args=[], prog_name="jmoe")
    assert not ended.value.code
    assert capsys.readouterr().out.split() == ["generate"]


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    run = jmoe("parity", "--checkpoint", tmp_path / "nowhere")
    assert run.returncode != 0
    assert "nowhere" in run.stderr
    assert "Traceback" not in run.stderr


def test_an_adapter_needs_a_checkpoint() -> None:
    run = jmoe("parity", "--adapter", TINY / "adapter")
    assert run.returncode == 2
    assert "--adapter needs --checkpoint" in run.stderr


@pytest.mark.slow
def test_bench_times_what_is_there_and_a_second_run_adds(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    run = jmoe("bench", "--tokens", "1", "--experts", "4", "--ranks", "0", "--out", out)
    assert run.returncode == 0, run.stderr
    assert "4 experts, 1 token: jmoe packed " in run.stdout
    run = jmoe("bench", "--tokens", "1", "--experts", "4", "--ranks", "16", "--skip", "vLLM LoRA", "--out", out)
    assert run.returncode == 0, run.stderr
    results = json.loads(out.read_text())
    without, lora = results["rows"]
    assert without["microseconds"]["jmoe"] > 0
    assert without["microseconds"]["jmoe packed"] > 0
    assert without["microseconds"]["triton_kernels"] == "no GPU"
    assert (lora["rank"], lora["adapters"], list(lora["microseconds"])) == (16, 1, ["jmoe packed"])
    assert {"date", "commit", "device", "versions", "layer"} <= set(results)


def test_bench_says_what_it_does_not_know() -> None:
    run = jmoe("bench", "--tokens", "1,none")
    assert run.returncode == 2
    assert "--tokens takes integers from 1 on" in run.stderr
    run = jmoe("bench", "--implementations", "marlin")
    assert run.returncode == 1
    assert "jmoe: implementations are jmoe packed, jmoe, " in run.stderr
    assert "got 'marlin'" in run.stderr


def test_tune_needs_a_gpu() -> None:
    run = jmoe("tune")
    assert run.returncode == 2
    assert "jmoe tune measures on a GPU, and JAX sees none" in run.stderr


def test_jmoes_own_warnings_are_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = cli.format_warning(CheckpointWarning("float32 weights are rounded"), CheckpointWarning, "file.py", 3)
    assert said == "jmoe: float32 weights are rounded\n"
    assert cli.format_warning("old", DeprecationWarning, "file.py", 3) == "file.py:3: DeprecationWarning: old\n"
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "argv", ["jmoe", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert warnings.formatwarning is cli.format_warning
