"""Whether every adapted expert that trained tokens reach learns from them, seen in a run's first two steps."""

import jax
import numpy as np
from jaxtyping import Array, Bool, Int32, Int64

from jmoe.finetune.batches import Batch
from jmoe.finetune.display import Display
from jmoe.finetune.processes import compiled_by_all
from jmoe.finetune.step import Attention, Outcome, Trainer, TrainState, experts_not_zero
from jmoe.gpt_oss.expert_counts import expert_counts
from jmoe.gpt_oss.model import GptOss

FEWEST = 8
"""Trained tokens from which on an expert must have a gradient; fewer may be the rounding of another compiled router."""


def count(
    model: GptOss, tokens: Array, weights: Array, segment_ids: Array, attention: Attention
) -> Int32[Array, "L E"]:
    """expert_counts of trained tokens, by the attention of the step."""
    return expert_counts(model, tokens, counted=weights > 0, segment_ids=segment_ids, **attention._asdict())


class ExpertCheck:
    """B's gradient is looked at in the first step, where A's is zero because B is; A's in the second."""

    def __init__(self, trainer: Trainer, display: Display) -> None:
        """A check of the trainer's steps that says on the display what it finds."""
        self.trainer = trainer
        self.display = display
        self._count = compiled_by_all(jax.jit(count, static_argnames="attention"))
        self._counts: Int64[np.ndarray, "L E"] = np.zeros((0, 0), np.int64)
        self._not_zero: dict[str, Bool[np.ndarray, "L E"]] = {}
        self._scaled: dict[str, Bool[np.ndarray, "L 1"]] = {}

    def before(self, step: int, state: TrainState, batch: Batch) -> None:
        """Notes which experts the batch's trained tokens reach, before the step that uses the state up."""
        if step > 1:
            return
        model = self.trainer.model(state)
        attention, on_host = self.trainer.attention_for(batch), self.trainer.on_host
        parts = [self.trainer.put(Batch(*arrays)) for arrays in zip(*batch, strict=True)]
        counts = [
            on_host(self._count(model, part.tokens, part.weights, part.segment_ids, attention=attention))
            for part in parts
        ]
        self._counts = np.sum(counts, axis=0)
        self._not_zero = jax.tree.map(on_host, experts_not_zero(model))
        assert model.lora is not None
        self._scaled = {name: np.asarray(scale) != 0 for name, scale in model.lora.scale.items()}

    def after(self, step: int, outcome: Outcome) -> None:
        """Looks at the step's gradients, and after the first says which experts no trained token reached.

        Raises:
          ValueError: an expert that trained tokens reached had no gradient: it would train nothing.
        """
        if step > 1 or not outcome.expert_gradients:
            return
        for name, found in outcome.expert_gradients.items():
            projection, part = name[:-2], name[-1]
            if part != "ba"[step]:
                continue
            # A factor's gradient is zero where the other factor or the scale is, as where an adapter has no LoRA.
            other = {"a": "b", "b": "a"}[part]
            due = (self._counts >= FEWEST) & self._not_zero[f"{projection}_{other}"] & self._scaled[projection]
            silent = np.argwhere(due & ~np.asarray(found)).tolist()
            if silent:
                layer, expert = silent[0]
                raise ValueError(
                    f"{len(silent)} experts got trained tokens and no gradient in {name}, first expert {expert} of "
                    f"layer {layer} with {self._counts[layer, expert]} tokens: the adapter would not learn there"
                )
        if step == 0:
            self._say_unreached()

    def _say_unreached(self) -> None:
        unseen = np.argwhere(self._counts == 0)
        if len(unseen):
            listed = ", ".join(f"{layer}:{expert}" for layer, expert in unseen[:20].tolist())
            more = f" and {len(unseen) - 20} more" if len(unseen) > 20 else ""
            self.display.say(f"in the first step no trained token reached (layer:expert) {listed}{more}")
        else:
            self.display.say("in the first step trained tokens reached every expert, and each had a gradient")
