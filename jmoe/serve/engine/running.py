"""A request that has not ended: its sequence, its options as the programs take them, and its events."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float, Int32

from jmoe.serve.engine.loaded_adapters import Adapter
from jmoe.serve.engine.programs import Drawing
from jmoe.serve.engine.request import (
    MOST_BIASES,
    Event,
    Finished,
    PromptLogprobs,
    PromptToken,
    Request,
    SamplingParams,
)
from jmoe.serve.engine.row_logprobs import RowLogprobs
from jmoe.serve.engine.row_options import pack_options
from jmoe.serve.engine.scheduler import Piece
from jmoe.serve.engine.sequence import Sequence

log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Running:
    """A request from its submission to its end.

    stops: the tokens that end it.
    prompt_entries: log-probabilities of its prompt's tokens so far; None if they are not wanted, or not any more.
    """

    request: Request
    sequence: Sequence
    on_event: Callable[[Event], None]
    adapter: Adapter | None
    options: Int32[np.ndarray, " W"]
    drawing: Drawing
    stops: frozenset[int]
    prompt_entries: list[PromptToken | None] | None

    @classmethod
    def create(
        cls,
        request: Request,
        sequence: Sequence,
        on_event: Callable[[Event], None],
        adapter: Adapter | None,
        *,
        seed: int,
        stop_tokens: tuple[int, ...],
    ) -> "Running":
        """stop_tokens: the model's own."""
        params = request.sampling
        own = () if params.ignore_eos else stop_tokens
        return cls(
            request,
            sequence,
            on_event,
            adapter,
            pack_options(params, seed, -1 if adapter is None else adapter.place),
            drawing_of(params),
            frozenset((*own, *params.stop_tokens)),
            None if params.prompt_logprobs is None else [],
        )

    def emit(self, event: Event) -> bool:
        """Hands an event over; False if its receiver has failed."""
        try:
            self.on_event(event)
        except Exception:
            log.exception("request %s: its receiver of events failed", self.request.id)
            return False
        return True

    def prompt_logprobs(self, piece: Piece, found: RowLogprobs, before: int) -> PromptLogprobs | None:
        """Takes a piece's log-probabilities, whose rows begin at `before`; the event once they are all there."""
        most = self.request.sampling.prompt_logprobs
        if self.prompt_entries is None or most is None:
            return None
        if piece.first == 0:
            self.prompt_entries = [None]
        end = min(piece.first + piece.count, self.sequence.prompt_tokens - 1)
        for position in range(piece.first, end):
            self.prompt_entries.append(PromptToken(*found.row(before + position - piece.first, most)))
        if not piece.last:
            return None
        event = PromptLogprobs(tuple(self.prompt_entries))
        self.prompt_entries = None
        self.sequence.shares = True
        return event

    def finished(self, reason: Literal["stop", "length"], stop_token: int | None = None) -> Finished:
        """The event of its end."""
        return Finished(
            reason=reason,
            stop_token=stop_token,
            prompt_tokens=self.sequence.prompt_tokens,
            cached_tokens=self.sequence.cached_tokens or 0,
            new_tokens=self.sequence.new_tokens,
        )

    def adjustments(self, vocabulary: int) -> tuple[Int32[np.ndarray, " V"], np.ndarray, Float[np.ndarray, " N"]]:
        """What penalties and logit_bias need after its tokens so far: counts, bias_tokens, biases of
        row_sampling.adjust."""
        new = self.sequence.tokens[self.sequence.prompt_tokens :]
        counts = 2 * np.bincount(new, minlength=vocabulary).astype(np.int32)
        counts[self.sequence.tokens[: self.sequence.prompt_tokens]] += 1
        bias = self.request.sampling.logit_bias
        tokens, biases = np.zeros(MOST_BIASES, np.int32), np.zeros(MOST_BIASES, np.float32)
        tokens[: len(bias)], biases[: len(bias)] = list(bias.keys()), list(bias.values())
        return counts, tokens, biases


def drawing_of(params: SamplingParams) -> Drawing:
    """The least of the programs that does what a request asks for."""
    if params.adjusts_logits or params.logprobs is not None:
        return "everything"
    if params.temperature == 0:
        return "greedy"
    truncates = params.top_p < 1 or params.top_k > 0 or params.min_p > 0
    return "truncated" if truncates else "random"
