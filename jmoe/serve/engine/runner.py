"""Plans put into effect: what the programs get, and what of their results is read."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
from jaxtyping import Array, Int32

from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.weights import LoraWeights
from jmoe.serve.engine.adapter_places import AdapterPlaces, padded_layers
from jmoe.serve.engine.budget import cache_budget, model_len, plan_geometry
from jmoe.serve.engine.device_state import DeviceState
from jmoe.serve.engine.loaded_adapters import Adapter
from jmoe.serve.engine.pages import Pages
from jmoe.serve.engine.placement import Placement, made
from jmoe.serve.engine.programs import DRAWINGS, Drawing, Programs
from jmoe.serve.engine.row_logprobs import RowLogprobs
from jmoe.serve.engine.running import Running
from jmoe.serve.engine.scheduler import Chunk, Limits, Step
from jmoe.serve.engine.sequence import Sequence
from jmoe.serve.engine.settings import EngineSettings
from jmoe.serve.engine.uploads import ChunkLayout, step_upload

MOST_PIECES = 32
"""Sequences in a chunk."""


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A plan whose programs have been handed to the device.

    drawn: each row's next token, and with "everything" log-probabilities behind it.
    prompt: log-probabilities of a chunk's tokens; None without.
    """

    plan: Step | Chunk
    drawn: Int32[Array, "B _"]
    prompt: Int32[Array, "T W"] | None = None

    def read(self) -> tuple[Int32[np.ndarray, " B"], RowLogprobs | None, RowLogprobs | None]:
        """(tokens, their log-probabilities, the prompt's), once they are there."""
        drawn = np.asarray(self.drawn)
        prompt = None if self.prompt is None else RowLogprobs.unpack(np.asarray(self.prompt))
        return drawn[:, 0], RowLogprobs.unpack(drawn[:, 1:]) if drawn.shape[1] > 1 else None, prompt


class Runner:
    """The model on the device with its state. All but the constructor is for one thread."""

    def __init__(self, model: GptOss, settings: EngineSettings) -> None:
        """Takes the memory, and compiles all programs or reads them from JAX's cache.

        Raises:
          ValueError: the memory does not hold one sequence of max_model_len, or the model's layout splits batches.
        """
        config = model.config
        self._config, self._dtype, self._settings = config, model.dtype, settings
        self._placement = Placement.of(model)
        row_sizes = sizes_up_to(settings.max_sequences)
        self._nobody = row_sizes[-1]
        self.places: AdapterPlaces | None = None
        form = None
        if settings.max_loras:
            self.places, form = self._empty_places(), next(self._layers(None))
        of_device = config if self._placement is None else self._placement.config(config)
        self.geometry = plan_geometry(of_device, model.dtype, settings, cache_budget(settings))
        self.max_model_len = model_len(config, settings, self.geometry)
        chunk_sizes = tuple(sorted(set(settings.chunk_sizes)))
        pieces = min(MOST_PIECES, row_sizes[-1])
        self.limits = Limits(
            rows=settings.max_sequences,
            row_sizes=row_sizes,
            chunk_sizes=chunk_sizes,
            prefill_tokens=settings.prefill_tokens,
            pieces=pieces,
        )
        columns = self.geometry.full_columns, self.geometry.windowed_columns
        self._layouts = {size: ChunkLayout(size, pieces, *columns) for size in chunk_sizes}
        self._state = self._empty()
        self.programs = Programs(
            model, self._state, self.places, form, row_sizes=row_sizes, layouts=list(self._layouts.values())
        )

    def reset(self) -> None:
        """Forgets all sequences, after an error that may have lost their state."""
        del self._state
        self._state = self._empty()

    def put_adapter(self, layer: LoraWeights, index: int, place: int) -> None:
        """One layer of an adapter into a place."""
        assert self.places is not None
        self.places = self.programs.put_adapter(self.places, layer, index, place)

    def has_places(self) -> bool:
        """Whether what the places hold is there; waits until it is computed. True without places."""
        try:
            jax.block_until_ready(self.places)
        except RuntimeError:  # JaxRuntimeError is one, as is the error of an array that was given up
            return False
        return True

    def restore_adapters(self, adapters: Iterable[Adapter]) -> None:
        """Takes memory for the places anew, and puts these adapters into theirs."""
        self.places = None
        self.places = self._empty_places()
        for adapter in adapters:
            for index, layer in enumerate(self._layers(adapter.weights)):
                self.put_adapter(jax.device_put(layer), index, adapter.place)
        jax.block_until_ready(self.places)

    def dispatch(self, plan: Step | Chunk, pages: Pages, running: Mapping[Sequence, Running]) -> InFlight:
        """Hands a plan's programs to the device, behind those of the plans before it."""
        if isinstance(plan, Step):
            return self._step(plan, pages, running)
        return self._chunk(plan, running)

    def _step(self, plan: Step, pages: Pages, running: Mapping[Sequence, Running]) -> InFlight:
        rows = []
        for sequence in plan.sequences:
            assert sequence.row is not None
            position = sequence.computed - 1
            own = sequence.pages
            rows.append((sequence.row, position, pages.full_page(own, position), pages.windowed_page(own, position)))
        step = jax.device_put(step_upload(rows, plan.size, self._nobody))
        logits = self.programs.decode(self._state, self.places, step)
        drawing = most_of(running[sequence].drawing for sequence in plan.sequences)
        drawn = self.programs.draw(drawing, self._state, logits, step)
        drawn.copy_to_host_async()
        return InFlight(plan, drawn)

    def _chunk(self, plan: Chunk, running: Mapping[Sequence, Running]) -> InFlight:
        layout = self._layouts[plan.size]
        upload, part = layout.empty(self._nobody)
        targets = np.zeros(plan.size, np.int32)
        before = 0
        for index, piece in enumerate(plan.pieces):
            sequence, own = piece.sequence, running[piece.sequence]
            assert sequence.row is not None
            end, after = before + piece.count, piece.first + piece.count
            part["tokens"][before:end] = sequence.tokens[piece.first : after]
            following = sequence.tokens[piece.first + 1 : after + 1]
            targets[before : before + len(following)] = following
            part["offsets"][index + 1 :] = end
            part["first"][index], part["rows"][index] = piece.first, sequence.row
            if piece.last:
                part["sampled"][index] = sequence.row
            held = sequence.pages
            part["full"][index, : len(held.full)] = held.full
            for number, page in enumerate(held.windowed, held.first_windowed):
                part["windowed"][index, number % layout.windowed_columns] = page
            part["options"][index] = own.options
            before = end
        logits, hidden, rows = self.programs.prefill(self._state, self.places, plan.size, jax.device_put(upload))
        prompt = None
        if any(running[piece.sequence].prompt_entries is not None for piece in plan.pieces):
            prompt = self.programs.prompt_logprobs(hidden, targets)
            prompt.copy_to_host_async()
        for piece in plan.pieces:
            own = running[piece.sequence]
            if piece.last and own.request.sampling.adjusts_logits:
                assert piece.sequence.row is not None
                self.programs.adjust_row(self._state, piece.sequence.row, *own.adjustments(self._config.vocab_size))
        drawing = most_of(running[piece.sequence].drawing for piece in plan.pieces if piece.last)
        drawn = self.programs.draw(drawing, self._state, logits, rows)
        drawn.copy_to_host_async()
        return InFlight(plan, drawn, prompt)

    def _empty_places(self) -> AdapterPlaces:
        own = self._settings
        room = own.lora_targets, own.max_loras, own.max_lora_rank
        empty = functools.partial(AdapterPlaces.empty, self._config, *room, self._dtype)
        return made(empty, None if self._placement is None else self._placement.places)

    def _layers(self, weights: LoraWeights | None) -> Iterator[LoraWeights]:
        own = self._settings
        return padded_layers(weights, self._config, own.lora_targets, own.max_lora_rank, self._dtype)

    def _empty(self) -> DeviceState:
        empty = functools.partial(DeviceState.empty, self._config, self.geometry, self._nobody, self._dtype)
        state = made(empty, None if self._placement is None else self._placement.state)
        jax.block_until_ready(state.pages.cache)  # memory that is not there is an error here, not in a step
        return state


def sizes_up_to(rows: int) -> tuple[int, ...]:
    """Powers of two up to the first that is enough."""
    return tuple(2**i for i in range((rows - 1).bit_length() + 1))


def most_of(drawings: Iterable[Drawing]) -> Drawing:
    """The least of the programs that does what all of these do."""
    return max(drawings, key=DRAWINGS.index, default="greedy")
