"""The engine: one thread that runs every request's tokens."""

import functools
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np

from jmoe.errors import first_line
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.weights import LoraWeights
from jmoe.serve.engine.adapter_places import check_adapter, padded_layers
from jmoe.serve.engine.commands import Commands
from jmoe.serve.engine.failures import Failures, GaveUpError, said
from jmoe.serve.engine.loaded_adapters import Adapter, LoadedAdapters
from jmoe.serve.engine.page_names import PageNames
from jmoe.serve.engine.pages import Pages
from jmoe.serve.engine.request import (
    Cancelled,
    EngineStoppedError,
    Event,
    Failed,
    LoadFailedError,
    QueueFullError,
    Request,
    Token,
    checked_prompt,
)
from jmoe.serve.engine.row_logprobs import RowLogprobs
from jmoe.serve.engine.runner import InFlight, Runner
from jmoe.serve.engine.running import Running
from jmoe.serve.engine.scheduler import Chunk, Scheduler, Step
from jmoe.serve.engine.sequence import Sequence
from jmoe.serve.engine.settings import EngineSettings, EngineStats

log = logging.getLogger(__name__)

NOT_FINITE = "the weights or the adapter hold NaN or infinity, or lead to it"


class Engine:
    """Continuous batching of one model; methods may be called from any thread."""

    def __init__(self, model: GptOss, settings: EngineSettings) -> None:
        """An engine that has not started.

        Raises:
          ValueError: the model has adapters of its own.
        """
        if model.lora is not None:
            raise ValueError("the engine's model must be without adapters, which load_adapter brings")
        self._model = model
        self._settings = settings
        self._state: Literal["new", "running", "draining", "stopped"] = "new"
        # Guards what follows, and says that a command or an end has come.
        self._changed = threading.Condition()
        self._commands = Commands(self._changed)
        self._requests: dict[str, Running] = {}
        self._submitted = 0
        self._adapters = LoadedAdapters(settings.max_loras)
        # The engine's thread alone, once it runs.
        self._running: dict[Sequence, Running] = {}
        self._in_flight: deque[InFlight] = deque()
        self._failures = Failures()
        self._prompt_tokens = self._cached_tokens = self._new_tokens = 0
        self._thread = threading.Thread(target=self._run, name="jmoe-engine", daemon=True)

    def start(self) -> None:
        """Compiles every program, or reads it from JAX's cache, and begins to run requests.

        Raises:
          ValueError: the memory does not hold one sequence of max_model_len.
          EngineStoppedError: it has been started or stopped before.
        """
        runner = Runner(self._model, self._settings)
        self._begin(runner, Pages(runner.geometry, caching=self._settings.prefix_caching))

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        """Puts a request at the queue's end.

        Args:
          on_event: called on the engine's thread, which waits for it.

        Raises:
          ValueError: the prompt is empty, or it or logit_bias has tokens that the vocabulary has not; the id is in use.
          TooLongError: the prompt with max_tokens is longer than max_model_len.
          UnknownAdapterError: the adapter is not loaded.
          QueueFullError: queue_limit requests wait.
          EngineStoppedError: the engine drains or has stopped.
        """
        if self._state == "new":
            raise EngineStoppedError("the engine has not started")
        tokens = checked_prompt(request, self._model.config.vocab_size, self._runner.max_model_len)
        params = request.sampling
        with self._changed:
            self._check_open()
            if request.id in self._requests:
                raise ValueError(f"id must be of no other request that runs, got {request.id!r}")
            if self._submitted + len(self._scheduler.waiting) >= self._settings.queue_limit:
                raise QueueFullError(f"{self._settings.queue_limit} requests wait already")
            adapter = self._adapters.use(request.adapter)
            identity = b"base" if adapter is None else b"adapter %d" % adapter.serial
            sequence = Sequence(
                tokens,
                len(tokens),
                params.max_tokens,
                PageNames(identity, self._runner.geometry.page_size),
                shares=params.prompt_logprobs is None,
            )
            seed = secrets.randbits(64) if params.seed is None else params.seed
            stop_tokens = self._model.config.stop_tokens
            running = Running.create(request, sequence, on_event, adapter, seed=seed, stop_tokens=stop_tokens)
            self._requests[request.id] = running
            self._submitted += 1
            self._commands.add(functools.partial(self._add, running))

    def cancel(self, request_id: str) -> None:
        """Ends a request within a step, with Cancelled; of one that has ended, nothing."""
        with self._changed:
            running = self._requests.get(request_id)
            if running is not None:
                self._commands.add(functools.partial(self._end, running, Cancelled()))

    def load_adapter(self, name: str, weights: LoraWeights) -> None:
        """Puts one adapter into a free place, and returns once requests may name it.

        Raises:
          NameTakenError: the name is taken.
          ValueError: the weights are of another model, of several adapters, on targets without room,
            or of a rank above max_lora_rank.
          NoPlaceError: all places are taken.
          LoadFailedError: the device has not taken it.
          EngineStoppedError: the engine has not started, drains or has stopped.
        """
        config, dtype, settings = self._model.config, self._model.dtype, self._settings
        check_adapter(weights, config, settings.lora_targets, settings.max_lora_rank)
        on_host = jax.tree.map(np.asarray, weights)  # which takes a while, and steps go on
        with self._changed:
            self._check_open()
            adapter = self._adapters.reserve(name, on_host)
        try:
            layers = padded_layers(adapter.weights, config, settings.lora_targets, settings.max_lora_rank, dtype)
            for index, layer in enumerate(layers):
                # One after another, so that no more than a layer is on the device twice, and steps go on between.
                work = functools.partial(self._put_layer, adapter, jax.device_put(layer), index)
                with self._changed:
                    self._check_open()
                    done = self._commands.add(work, may_fail=True)
                done.result()
            with self._changed:
                self._adapters.loaded(adapter)
        except BaseException as error:
            with self._changed:
                self._adapters.failed(adapter)
            if isinstance(error, RuntimeError | GaveUpError):
                raise LoadFailedError(f"the adapter is not loaded: {first_line(error)}") from error
            raise

    def unload_adapter(self, name: str) -> None:
        """New requests cannot name the adapter from now on; its place is free once those that do have ended.

        Raises:
          UnknownAdapterError: it is not loaded.
        """
        with self._changed:
            self._adapters.unload(name)

    def adapters(self) -> tuple[str, ...]:
        """The names that requests may use."""
        with self._changed:
            return self._adapters.names()

    def stats(self) -> EngineStats:
        """How busy the engine is; zeros before it has started."""
        if self._thread.ident is None:
            return EngineStats()
        full = self._scheduler.pages.full
        return EngineStats(
            queued=self._submitted + len(self._scheduler.waiting),
            running=len(self._scheduler.active),
            pages_total=full.total,
            pages_free=full.free,
            cached_pages=full.cached,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            new_tokens=self._new_tokens,
            preemptions=self._scheduler.preemptions,
            compiled_programs=self._runner.programs.count,
            max_model_len=self._runner.max_model_len,
        )

    @property
    def takes_requests(self) -> bool:
        """Whether it has started and neither drains nor has stopped or failed."""
        return self._state == "running"

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, and waits until those it has have ended.

        timeout: seconds; None: as long as it takes.

        Returns:
          whether all have ended.
        """
        with self._changed:
            if self._state == "running":
                self._state = "draining"
            return self._changed.wait_for(lambda: not self._requests or self._state == "stopped", timeout)

    def stop(self) -> None:
        """Ends the thread; what has not ended gets Failed."""
        with self._changed:
            self._state = "stopped"
            self._changed.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _begin(self, runner: Runner, pages: Pages) -> None:
        """Runs requests with these."""
        with self._changed:
            if self._state != "new":
                raise EngineStoppedError(f"an engine starts once, and this one is {self._state}")
            self._runner = runner
            self._scheduler = Scheduler(pages, runner.limits)
            self._state = "running"
            self._thread.start()

    def _check_open(self) -> None:
        if self._state != "running":
            raise EngineStoppedError(f"the engine takes nothing more: it is {self._state}")

    # What follows is for the engine's thread.

    def _run(self) -> None:
        message = "the engine was stopped"
        try:
            while self._obey():
                self._turn()
        except BaseException as error:
            message = f"the engine has failed: {said(error)}"
            log.critical(message, exc_info=not isinstance(error, GaveUpError))
        with self._changed:
            self._state = "stopped"
            self._commands.refuse(message)
            left = list(self._requests.values())
        for running in left:
            running.emit(Failed(message))
        with self._changed:
            self._requests.clear()
            self._changed.notify_all()

    def _obey(self) -> bool:
        """Does what has been asked for; waits if there is nothing else to do. False: the engine shall stop."""
        scheduler = self._scheduler
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._commands
                    or self._state == "stopped"
                    or self._in_flight
                    or scheduler.active
                    or scheduler.waiting
                )
            )
            if self._state == "stopped":
                return False
            asked = len(self._commands)
        self._commands.obey(asked)
        return True

    def _turn(self) -> None:
        """Hands the next step to the device, then reads the one before."""
        plan = None
        try:
            plan = self._scheduler.plan()
            if plan is not None:
                self._in_flight.append(self._runner.dispatch(plan, self._scheduler.pages, self._running))
            elif not self._in_flight and (self._scheduler.active or self._scheduler.waiting):
                raise RuntimeError("the scheduler has no plan for what waits")
            if self._in_flight and (plan is None or len(self._in_flight) > 1):
                self._take_results(self._in_flight[0])
                self._failures.succeeded(self._in_flight.popleft().plan)
        except Exception as error:
            self._recover(error, plan)

    def _recover(self, error: Exception, plan: Step | Chunk | None) -> None:
        """Fails what a failed step may concern, and has everything else computed again.

        Raises:
          GaveUpError: steps have failed too often.
        """
        plans = [step.plan for step in self._in_flight] + ([] if plan is None else [plan])
        self._in_flight.clear()
        concerned = {sequence for each in plans for sequence in each.sequences}
        for sequence in concerned or set(self._running):
            if sequence in self._running:
                self._end(self._running[sequence], Failed(f"a step has failed: {said(error)}"))
        self._failures.failed(plans, error)
        self._scheduler.put_back_all()
        self._scheduler.pages.forget_all()
        self._runner.reset()
        self._keep_adapters()

    def _put_layer(self, adapter: Adapter, layer: LoraWeights, index: int) -> None:
        """One layer of an adapter that is being loaded."""
        try:
            self._runner.put_adapter(layer, index, adapter.place)
        except Exception:
            self._keep_adapters()
            raise

    def _keep_adapters(self) -> None:
        """Puts all adapters into their places again if an error has taken these from the device.

        Raises:
          GaveUpError: it cannot.
        """
        if self._runner.has_places():
            return
        log.error("an error has taken the adapters from the device: they are put there again")
        with self._changed:
            adapters = self._adapters.to_restore()
        try:
            self._runner.restore_adapters(adapters)
        except Exception as error:
            raise GaveUpError(f"the adapters cannot be put on the device again: {first_line(error)}") from error

    def _add(self, running: Running) -> None:
        with self._changed:
            self._submitted -= 1
            self._scheduler.add(running.sequence)
        self._running[running.sequence] = running

    def _end(self, running: Running, event: Event) -> None:
        """A request's last event, once all that it held is free."""
        if running.sequence not in self._running:
            return
        self._scheduler.end(running.sequence)
        del self._running[running.sequence]
        self._cached_tokens += running.sequence.cached_tokens or 0
        with self._changed:
            self._adapters.release(running.adapter)
        running.emit(event)
        with self._changed:
            del self._requests[running.request.id]
            self._changed.notify_all()

    def _take_results(self, step: InFlight) -> None:
        """Waits for a step's results, and tells them to those who asked."""
        tokens, logprobs, prompt = step.read()
        before = 0
        for index, sequence in enumerate(step.plan.sequences):
            piece = step.plan.pieces[index] if isinstance(step.plan, Chunk) else None
            running = self._running.get(sequence)
            if piece is not None:
                self._prompt_tokens += piece.count
                if running is not None and prompt is not None:
                    event = running.prompt_logprobs(piece, prompt, before)
                    if event is not None and tokens[index] >= 0:
                        self._tell(running, event)
                        running = self._running.get(sequence)  # not if its receiver has failed
                before += piece.count
            if running is not None and (piece is None or piece.last):
                self._take_token(running, int(tokens[index]), logprobs, index)

    def _take_token(self, running: Running, token: int, logprobs: RowLogprobs | None, index: int) -> None:
        """The next token of a request; negative: its logits were not finite."""
        sequence, params = running.sequence, running.request.sampling
        ends = token < 0 or token in running.stops or params.max_tokens == 0
        self._scheduler.token_read(sequence, None if ends else token)
        if token < 0:
            self._scheduler.pages.forget(sequence.pages)
            self._end(
                running, Failed(f"the logits of new token {sequence.new_tokens + 1} are not finite: {NOT_FINITE}")
            )
        elif params.max_tokens == 0:
            self._end(running, running.finished("length"))
        elif ends:
            self._end(running, running.finished("stop", token))
        else:
            self._new_tokens += 1
            own: tuple[float | None, tuple[tuple[int, float], ...]] = (None, ())
            if params.logprobs is not None and logprobs is not None:
                own = logprobs.row(index, params.logprobs)
            self._tell(running, Token(token, *own, cached_tokens=sequence.cached_tokens or 0))
            if sequence.new_tokens == params.max_tokens:
                self._end(running, running.finished("length"))

    def _tell(self, running: Running, event: Event) -> None:
        """Emits an event; a request whose receiver fails is cancelled."""
        if not running.emit(event):
            self._end(running, Cancelled())
