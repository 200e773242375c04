"""The model that is served: what requests need of it beside the engine."""

import asyncio
import copy
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jmoe.serve.engine import Engine
from jmoe.serve.errors import ApiError
from jmoe.serve.large_bodies import LargeBodies
from jmoe.serve.metrics import Metrics
from jmoe.serve.protocol.common import Body
from jmoe.serve.running import Bridge, Running
from jmoe.serve.token_texts import TokenTexts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What requests need to know of the model.

    Attributes:
      names: what requests may call the base model; the first is the one that it is listed by.
      root: where it was loaded from.
      vocab_size: token ids are below it.
      stop_tokens: what ends a text.
      max_model_len: tokens of prompt and answer together.
      created: when it was loaded, in seconds since 1970.
    """

    names: tuple[str, ...]
    root: str
    vocab_size: int
    stop_tokens: tuple[int, ...]
    max_model_len: int
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


class Service:
    """An engine that is ready, its model's tokenizer, and the loop in which requests are answered.

    Attributes:
      tokenizer: for the event loop's thread alone.
      token_texts: of single tokens.
      large_bodies: what reads them.
      body_bytes: of the bodies that are being read.
    """

    def __init__(
        self,
        engine: Engine,
        model: ModelFacts,
        tokenizer: Any,
        prompt_tokenizer: Any,
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
        read_adapter: Callable[[str], Any] | None = None,
    ) -> None:
        """To be made once the engine has started.

        Args:
          tokenizer, prompt_tokenizer: the same one, loaded twice, as one that encodes may not decode in another thread.
          read_adapter: the weights of an adapter's directory, as the engine takes them.
        """
        self.engine = engine
        self.model = model
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.token_texts = TokenTexts(tokenizer)
        self.read_adapter = read_adapter
        self.large_bodies = LargeBodies()
        self.body_bytes = 0
        self._bridge = Bridge(loop)
        # A thread with a tokenizer of its own for short requests, and one for long ones, which they need not wait for.
        self._prompts = [
            (ThreadPoolExecutor(1, "prompts"), prompt_tokenizer),
            (ThreadPoolExecutor(1, "long prompts"), copy.deepcopy(prompt_tokenizer)),
        ]

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a request's `model` names; None: the base model.

        Raises:
          ApiError: 404, there is neither a model nor an adapter of this name.
        """
        if name is None or name in self.model.names:
            return None
        if name not in self.engine.adapters():
            raise ApiError.unknown_model(name)
        return name

    async def with_tokenizer[T](self, asked: Body, work: Callable[[Any], T]) -> T:
        """What the function makes of a tokenizer for prompts, in a thread of its own: long prompts take long."""
        thread, tokenizer = self._prompts[asked.is_long]
        return await asyncio.get_running_loop().run_in_executor(thread, work, tokenizer)

    def running(self) -> Running:
        """For one request of HTTP."""
        return Running(self.engine, self._bridge, self.metrics)

    def close(self) -> None:
        """Ends the threads of the prompts, and the process of large bodies."""
        self.large_bodies.close()
        for thread, _ in self._prompts:
            thread.shutdown(wait=False, cancel_futures=True)
