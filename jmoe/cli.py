"""The `jmoe` command."""

import errno
import os
import sys
import traceback
import warnings
from typing import Annotated

import jax
import typer

from jmoe import __version__
from jmoe.__main__ import INTERRUPTED
from jmoe.commands.bench import bench
from jmoe.commands.bench_model import bench_model
from jmoe.commands.bench_serve import bench_serve
from jmoe.commands.convert_adapter import convert_adapter
from jmoe.commands.doctor import doctor
from jmoe.commands.evaluate import evaluate
from jmoe.commands.finetune import finetune
from jmoe.commands.generate import generate
from jmoe.commands.merge import merge
from jmoe.commands.parity import parity
from jmoe.commands.profile import profile
from jmoe.commands.serve import serve
from jmoe.commands.tune import tune
from jmoe.commands.usage_errors import OneLineErrors
from jmoe.compilation_cache import keep_compiled_programs
from jmoe.errors import first_line
from jmoe.files import naming

python_format = warnings.formatwarning

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    """Prints jmoe's version and ends, if that is wanted."""
    if wanted:
        typer.echo(f"jmoe {__version__}")
        raise typer.Exit


@app.callback()
def jmoe(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error arose, not its line alone; may stand anywhere.")
    ] = False,
) -> None:
    """MXFP4 mixture-of-experts with LoRA for JAX."""


app.command()(generate)
app.command()(finetune)
app.command("eval")(evaluate)
app.command()(serve)
app.command()(merge)
app.command()(convert_adapter)
app.command()(doctor)
app.command()(parity)
app.command()(bench)
app.command()(bench_model)
app.command()(bench_serve)
app.command()(tune)
app.command()(profile)


def main() -> None:
    """Runs the `jmoe` command: what is wrong with the input is one line, not a traceback."""
    debug = take_debug()
    warnings.formatwarning = format_warning
    keep_compiled_programs()
    for stream in (sys.stdout, sys.stderr):
        if not (stream.encoding or "").lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            app()
        finally:
            with naming("standard output"):
                sys.stdout.flush()
    except BrokenPipeError:
        leave(1)
    except KeyboardInterrupt:
        leave(INTERRUPTED)
    except RecursionError as error:
        fail(f"the input is nested too deeply, or a program calls itself for ever: {error}", debug)
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        nameless = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
        fail((str(error) or type(error).__name__) + (": standard output, or a file" if nameless else ""), debug)
    except MemoryError as error:
        fail(f"the computer's memory ran out; ask for fewer or shorter sequences at once: {error}", debug)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(f"memory ran out; ask for fewer or shorter sequences at once: {first_line(error)}", debug)


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of jmoe's own as a line for people, without the place in the program; others as Python has them."""
    if category.__module__.split(".")[0] == "jmoe":
        return f"jmoe: {message}\n"
    return python_format(message, category, filename, lineno, line)


def take_debug() -> bool:
    """Whether --debug stands anywhere among the arguments before `--`; takes it out of them."""
    before = sys.argv[: sys.argv.index("--")] if "--" in sys.argv else sys.argv
    if "--debug" not in before[1:]:
        return False
    sys.argv.remove("--debug")
    return True


def fail(message: str, debug: bool) -> None:
    """Says what is wrong, and ends with 1."""
    if debug:
        traceback.print_exc()
    print(f"jmoe: {message}", file=sys.stderr)
    leave(1)


def leave(status: int) -> None:
    """Ends, whether or not what is left for standard output can be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(status)


if __name__ == "__main__":
    from jmoe.__main__ import main as entry_point

    entry_point()
