"""Reading the JSON of large bodies in a process of its own.

The parser holds Python's lock: in a thread of this process, too, neither answers nor the engine would go on meanwhile.
"""

import asyncio
import os
import pickle
import subprocess
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import ValidationError

from jmoe.serve.errors import ApiError
from jmoe.serve.protocol.common import Body


class LargeBodies:
    """The process, which begins with the first large body, and reads one after another."""

    def __init__(self) -> None:
        """No process yet."""
        self._thread = ThreadPoolExecutor(1, "large bodies")
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    async def read[B: Body](self, form: type[B], content: bytearray) -> B:
        """As form.read; tokens of prompts are arrays.

        Raises:
          ApiError: 400, it is not of this form; 503, the process has ended, and the next body gets another.
        """
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, form, content)

    def _read[B: Body](self, form: type[B], content: bytearray) -> B:
        self._check_open()
        process = self._process or self._begin()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((form, content), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            found = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._end()
            raise ApiError.unavailable("the process that reads large bodies has ended; try again") from None
        except BaseException:
            self._end()  # what is left of an answer in the pipe is not the next one's
            raise
        if isinstance(found, form):
            return found
        status, message, param = found
        raise ApiError(status, message, param=param)

    def _check_open(self) -> None:
        if self._closed:
            raise ApiError.unavailable("the server is stopping")

    def _begin(self) -> "subprocess.Popen[bytes]":
        # In a session of its own, as Ctrl-C and other signals to this process's group are not for it. It ends when its
        # input does.
        command = [sys.executable, "-P", "-c", f"import {__name__} as large_bodies; large_bodies.read_all()"]
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            start_new_session=True,
        )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        self._thread.submit(self._end)
        self._thread.shutdown(wait=False)


def read_all() -> None:
    """What the process does: bodies from standard input to standard output, until there are no more."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what prints is not an answer
    while True:
        try:
            form, content = pickle.load(source)
        except EOFError:
            return
        pickle.dump(read_one(form, content), sink, pickle.HIGHEST_PROTOCOL)
        sink.flush()


def read_one(form: type[Body], content: bytearray) -> Body | tuple[int, str, str | None]:
    """The body with its lists of tokens as arrays, which are handed over at once; or an error's status, message and
    param."""
    try:
        found = form.read(content)
    except ValidationError as error:
        refused = ApiError.of_validation(error)
        return refused.status, refused.message, refused.param
    return found.model_copy(update={name: with_arrays(value) for name, value in found if isinstance(value, list)})


def with_arrays(value: list[Any]) -> Any:
    """Lists of integers as arrays."""
    if value and all(type(each) is int for each in value):
        return array("q", value)
    return [with_arrays(each) if isinstance(each, list) else each for each in value]
