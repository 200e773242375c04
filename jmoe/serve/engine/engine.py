"""The engine: one thread that runs every request's tokens."""

from collections.abc import Callable

from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.weights import LoraWeights
from jmoe.serve.engine.request import Event, Request
from jmoe.serve.engine.settings import EngineSettings, EngineStats


class Engine:
    """Continuous batching of one model; methods may be called from any thread."""

    def __init__(self, model: GptOss, settings: EngineSettings) -> None:
        """An engine that has not started.

        Raises:
          ValueError: the model has adapters of its own.
        """
        self._model = model
        self._settings = settings

    def start(self) -> None:
        """Compiles every program, or reads it from JAX's cache, and begins to run requests.

        Raises:
          ValueError: the memory does not hold one sequence of max_model_len.
        """
        raise NotImplementedError

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        """Puts a request at the queue's end.

        Args:
          on_event: called on the engine's thread, which waits for it.

        Raises:
          ValueError: the prompt is empty or has tokens that the vocabulary has not; the id is in use.
          TooLongError: the prompt with max_tokens is longer than max_model_len.
          UnknownAdapterError: the adapter is not loaded.
          QueueFullError: queue_limit requests wait.
          EngineStoppedError: the engine drains or has stopped.
        """
        raise NotImplementedError

    def cancel(self, request_id: str) -> None:
        """Ends a request within a step, with Cancelled; of one that has ended, nothing."""
        raise NotImplementedError

    def load_adapter(self, name: str, weights: LoraWeights) -> None:
        """Puts one adapter into a free place, and returns once requests may name it.

        Raises:
          ValueError: the name is taken; the weights are of another model, of several adapters, on targets without room,
            or of a rank above max_lora_rank.
          NoPlaceError: all places are taken.
        """
        raise NotImplementedError

    def unload_adapter(self, name: str) -> None:
        """New requests cannot name the adapter from now on; its place is free once those that do have ended.

        Raises:
          UnknownAdapterError: it is not loaded.
        """
        raise NotImplementedError

    def adapters(self) -> tuple[str, ...]:
        """The names that requests may use."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """How busy the engine is."""
        raise NotImplementedError

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, and waits until those it has have ended.

        timeout: seconds; None: as long as it takes.

        Returns:
          whether all have ended.
        """
        raise NotImplementedError

    def stop(self) -> None:
        """Ends the thread; what has not ended gets Failed."""
        raise NotImplementedError
