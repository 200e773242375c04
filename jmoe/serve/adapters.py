"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters that come and go while the server runs."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from jmoe.errors import first_line, in_short
from jmoe.serve.engine import EngineStoppedError, LoadFailedError, NameTakenError, NoPlaceError, UnknownAdapterError
from jmoe.serve.errors import ApiError
from jmoe.serve.protocol.others import LoadAdapterRequest, UnloadAdapterRequest
from jmoe.serve.service import Service


async def load(asked: LoadAdapterRequest, service: Service, allowed: Sequence[Path]) -> None:
    """Loads an adapter from below one of the directories that are allowed.

    Raises:
      ApiError: 403, it lies elsewhere; 400, it cannot be loaded, or the name is taken; 409, all places are taken; 500,
        the device has not taken it; 503, the engine has stopped.
    """
    check_on(allowed)
    if asked.lora_name in service.model.names:
        raise ApiError.invalid("lora_name", f"lora_name: {in_short(asked.lora_name)} is the model's own name")
    await asyncio.to_thread(_load, service, asked, allowed)


async def unload(asked: UnloadAdapterRequest, service: Service, allowed: Sequence[Path]) -> None:
    """Drops an adapter: new requests cannot name it, and those that do keep it to their end.

    Raises:
      ApiError: 404, there is none of this name.
    """
    check_on(allowed)
    try:
        await asyncio.to_thread(service.engine.unload_adapter, asked.lora_name)
    except UnknownAdapterError:
        raise ApiError.unknown_model(asked.lora_name) from None


def check_on(allowed: Sequence[Path]) -> None:
    """Raises ApiError, 404, if the server was not started with directories of adapters."""
    if not allowed:
        raise ApiError(404, "adapters are not loaded while the server runs: --adapter-directory allows it")


def allowed_directory(path: str, allowed: Sequence[Path]) -> Path:
    """The directory that a path leads to, links followed, if it and all files in it are below an allowed one.

    Raises:
      ApiError: 403, it is not, or there is none.
    """
    try:
        directory = Path(path).resolve(strict=True)
        if _is_below(directory, allowed) and all(
            _is_below(file.resolve(strict=True), allowed) for file in directory.iterdir()
        ):
            return directory
    except (OSError, RuntimeError, ValueError):  # which of them is nothing to tell who may not read there
        pass
    raise ApiError(
        403, f"lora_path: {in_short(path)} is not a directory below those that are allowed", param="lora_path"
    )


def _is_below(path: Path, allowed: Sequence[Path]) -> bool:
    return any(path.is_relative_to(each.resolve()) for each in allowed)


def _load(service: Service, asked: LoadAdapterRequest, allowed: Sequence[Path]) -> None:
    directory = allowed_directory(asked.lora_path, allowed)
    if service.read_adapter is None:
        raise ApiError(404, "this server has no room for adapters: --max-loras gives it some")
    try:
        service.engine.load_adapter(asked.lora_name, service.read_adapter(str(directory)))
    except NoPlaceError as error:
        raise ApiError(409, first_line(error), param="lora_name") from None
    except NameTakenError as error:
        raise ApiError.of_value("lora_name", error) from None
    except EngineStoppedError:
        raise ApiError.unavailable("the server is stopping") from None
    except LoadFailedError as error:
        raise ApiError.failed(first_line(error)) from None
    except (OSError, ValueError) as error:
        raise ApiError.of_value("lora_path", error) from None
