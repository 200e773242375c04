"""Errors of options and arguments in one line, as all errors of the command are."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

UsageError: Any = typer.BadParameter.__base__
"""click's, which typer brings along from some version on."""


class OneLineErrors(TyperGroup):
    """Commands whose usage errors are a line on standard error, with status 2."""

    def main(self, *args: Any, **options: Any) -> Any:
        """As click's."""
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        try:
            status = super().main(*args, **{**options, "standalone_mode": False})
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                print(f"jmoe: {one_line(error)}", file=sys.stderr)
            sys.exit(error.exit_code)
        except typer.Abort:
            print("jmoe: aborted", file=sys.stderr)
            sys.exit(1)
        sys.exit(status if isinstance(status, int) else 0)


def one_line(error: Any) -> str:
    """What is wrong; with the option's name if the message is the parser's, which leaves it to click to say it."""
    own = isinstance(error, typer.BadParameter) and error.param is None and error.param_hint is None
    return " ".join((error.message if own else error.format_message()).split())
