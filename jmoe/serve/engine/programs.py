"""The engine's programs: a fixed number, all compiled before the first request."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.model import GptOss
from jmoe.gpt_oss.paged import PagedDecodeAttention, PagedPrefillAttention
from jmoe.gpt_oss.run import Inputs
from jmoe.gpt_oss.weights import LoraWeights
from jmoe.serve.engine.adapter_places import AdapterPlaces
from jmoe.serve.engine.device_state import Adjustments, DeviceState, PageState
from jmoe.serve.engine.placement import Placement
from jmoe.serve.engine.row_logprobs import logprob_rows, prompt_logprob_rows
from jmoe.serve.engine.row_options import RowOptions
from jmoe.serve.engine.row_sampling import adjust, choose_rows
from jmoe.serve.engine.uploads import STEP_WIDTH, ChunkLayout

type Drawing = Literal["greedy", "random", "truncated", "everything"]
"""What a step's rows need: the likeliest tokens; draws from all; from some by top_k, top_p and min_p; or these,
penalties, logit_bias and log-probabilities. Each can do what those before it can, with the same tokens."""

DRAWINGS: tuple[Drawing, ...] = ("greedy", "random", "truncated", "everything")


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model as its arrays alone: what it takes to find them in the model would be paid again at each step."""

    leaves: tuple[Array, ...]
    tree: Any
    config: Config

    @classmethod
    def of(cls, model: GptOss) -> "Weights":
        """A model's, without adapters."""
        leaves, tree = jax.tree.flatten(model)
        return cls(tuple(leaves), tree, model.config)

    def model(self, leaves: Sequence[Array], places: AdapterPlaces | None) -> GptOss:
        """The model of such arrays, with adapters on its experts."""
        model = jax.tree.unflatten(self.tree, leaves)
        return model if places is None else model.with_adapters(places.experts)


def decode_step(
    weights: Weights,
    leaves: Sequence[Array],
    places: AdapterPlaces | None,
    pages: PageState,
    tokens: Int32[Array, " R+1"],
    options: Int32[Array, "R+1 W"],
    step: Int32[Array, "B 4"],
) -> tuple[Float[Array, "B V"], PageState]:
    """(logits after each row's latest token, the pages with it); step: see uploads.step_upload."""
    model = weights.model(leaves, places)
    rows, position, full_page, windowed_page = step.T
    there = jnp.maximum(position, 0)
    page_size = pages.cache[0].shape[3]
    full, windowed = (
        table.at[rows, there // page_size % table.shape[1]].set(page)
        for table, page in ((pages.full, full_page), (pages.windowed, windowed_page))
    )
    adapters = None
    if places is not None:
        adapters = jnp.where(position < 0, -1, RowOptions.unpack(options[rows]).adapter)[:, None]
    tables = pages.tables(model.config, full[rows], windowed[rows])
    attention = PagedDecodeAttention(model.config.windows, model.stack.sinks, position, tables)
    inputs = Inputs(tokens[rows][:, None], there[:, None], adapters)
    on_attention = None if places is None else places.attention
    hidden, cache = model.run_layers_in_place(inputs, attention, pages.cache, on_attention)
    return model.logits(hidden)[:, 0], PageState(cache, full, windowed)


def prefill_chunk(
    weights: Weights,
    layout: ChunkLayout,
    leaves: Sequence[Array],
    places: AdapterPlaces | None,
    pages: PageState,
    options: Int32[Array, "R+1 W"],
    upload: Int32[Array, " N"],
) -> tuple[Float[Array, "S V"], Float[Array, "T H"], Int32[Array, "S 4"], PageState, Int32[Array, "R+1 W"]]:
    """(logits after each piece's last token, what `hidden` has at all tokens, the rows as a step's, the pages, the
    options with the pieces').

    upload: see ChunkLayout.
    """
    model = weights.model(leaves, places)
    part = layout.split(upload)
    offsets, first = part["offsets"], part["first"]
    index = jnp.arange(layout.tokens, dtype=jnp.int32)
    owner = jnp.searchsorted(offsets[1:], index, side="right").astype(jnp.int32)
    own = jnp.minimum(owner, layout.pieces - 1)
    padding = owner == layout.pieces
    positions = jnp.where(padding, 0, first[own] + index - offsets[own])
    adapters = None
    if places is not None:
        adapters = jnp.where(padding, -1, RowOptions.unpack(part["options"]).adapter[own])[None]
    tables = pages.tables(model.config, part["full"], part["windowed"])
    attention = PagedPrefillAttention(model.config.windows, model.stack.sinks, offsets, first, tables)
    inputs = Inputs(part["tokens"][None], positions[None], adapters)
    on_attention = None if places is None else places.attention
    hidden, cache = model.run_layers_in_place(inputs, attention, pages.cache, on_attention)
    last = hidden[0, jnp.maximum(offsets[1:] - 1, 0)]
    full, windowed = (
        table.at[part["rows"]].set(part[name]) for name, table in (("full", pages.full), ("windowed", pages.windowed))
    )
    nothing = jnp.zeros_like(first)
    position = first + jnp.diff(offsets) - 1
    rows = jnp.stack([part["sampled"], position, nothing, nothing], axis=1)
    options = options.at[part["rows"]].set(part["options"])
    return model.logits(last[:, None])[:, 0], hidden[0], rows, PageState(cache, full, windowed), options


def draw(
    drawing: Drawing,
    logits: Float[Array, "B V"],
    tokens: Int32[Array, " R+1"],
    options: Int32[Array, "R+1 W"],
    step: Int32[Array, "B 4"],
    adjustments: Adjustments | None = None,
) -> tuple[Int32[Array, "B _"], Int32[Array, " R+1"], Adjustments | None]:
    """(each row's next token, -1 where its logits are not finite, with "everything" and log-probabilities behind it;
    all rows' latest tokens; the adjustments)."""
    rows, position = step[:, 0], step[:, 1]
    finite = jnp.isfinite(logits).all(axis=1)
    own = RowOptions.unpack(options[rows])
    raw = logits
    if adjustments is not None:
        counts, bias_tokens, biases = (
            each[rows] for each in (adjustments.counts, adjustments.bias_tokens, adjustments.biases)
        )
        logits = adjust(logits, own, counts, bias_tokens, biases)
    if drawing == "greedy":
        chosen = jnp.argmax(logits, axis=1).astype(jnp.int32)
    else:
        truncates = drawing in ("truncated", "everything")
        chosen = choose_rows(logits, own, position + 1, truncates=truncates)
    result = jnp.where(finite, chosen, -1)[:, None]
    if adjustments is not None:
        adjustments = dataclasses.replace(adjustments, counts=adjustments.counts.at[rows, chosen].add(2))
        result = jnp.concatenate([result, logprob_rows(raw, chosen)], axis=1)
    return result, tokens.at[rows].set(chosen), adjustments


def put_adjustments(
    adjustments: Adjustments,
    row: Int32[Array, ""],
    counts: Int32[Array, " V"],
    bias_tokens: Int32[Array, " N"],
    biases: Float[Array, " N"],
) -> Adjustments:
    """With one row's."""
    return Adjustments(
        adjustments.counts.at[row].set(counts),
        adjustments.bias_tokens.at[row].set(bias_tokens),
        adjustments.biases.at[row].set(biases),
    )


class Programs:
    """All programs for one model, one geometry and one number of places, compiled."""

    def __init__(
        self,
        model: GptOss,
        state: DeviceState,
        places: AdapterPlaces | None,
        layer: LoraWeights | None,
        *,
        row_sizes: Sequence[int],
        layouts: Sequence[ChunkLayout],
    ) -> None:
        """Compiles them, or reads them from JAX's cache; several at a time.

        layer: the form of what put_adapter takes.
        """
        self._weights = weights = Weights.of(model)
        config, dtype = model.config, model.dtype
        leaves, pages, tokens, options = weights.leaves, state.pages, state.tokens, state.options
        placement = Placement.of(model)
        # What is not told is XLA's choice on a mesh, and a program's results are another's arguments.
        whole, of_pages, of_places, heads = None, None, None, 1
        if placement is not None:
            whole, of_pages, heads = placement.whole, placement.pages(pages), placement.heads
            of_places = places and placement.places(places)
        pieces = layouts[0].pieces

        def integers(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)

        def logits(rows: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, config.vocab_size), jnp.float32, sharding=whole)

        with Compiler() as compiler:
            decode = {
                size: compiler.add(
                    functools.partial(decode_step, weights),
                    (leaves, places, pages, tokens, options, integers(size, STEP_WIDTH)),
                    donated=(2,),
                    results=(whole, of_pages),
                )
                for size in row_sizes
            }
            chunks = {
                layout.tokens: compiler.add(
                    functools.partial(prefill_chunk, weights, layout),
                    (leaves, places, pages, options, integers(layout.size)),
                    donated=(2, 3),
                    results=(whole, whole, whole, of_pages, whole),
                )
                for layout in layouts
            }
            prompts = {
                layout.tokens: compiler.add(
                    prompt_logprob_rows,
                    (
                        jax.ShapeDtypeStruct((layout.tokens, config.hidden_size), dtype, sharding=whole),
                        model.head.get_value(),
                        integers(layout.tokens),
                    ),
                    results=whole,
                )
                for layout in layouts
            }
            draws = {}
            for drawing in DRAWINGS:
                own = (state.adjustments,) if drawing == "everything" else ()
                for size in sorted({*row_sizes, pieces}):
                    arguments = logits(size), tokens, options, integers(size, STEP_WIDTH), *own
                    donated = (1, 4) if own else (1,)
                    draws[drawing, size] = compiler.add(
                        functools.partial(draw, drawing), arguments, donated=donated, results=whole
                    )
            row, numbers = integers(), state.adjustments
            adjust_row = compiler.add(
                put_adjustments,
                (numbers, row, *(row_of(leaf, whole) for leaf in jax.tree.leaves(numbers))),
                donated=(0,),
                results=whole,
            )
            put = None
            if places is not None:

                def put_layer(places: AdapterPlaces, layer: LoraWeights, index: Array, place: Array) -> AdapterPlaces:
                    return places.put(layer, index, place, config, dtype, heads)

                arguments = places, layer, integers(), integers()
                put = compiler.add(put_layer, arguments, donated=(0,), results=of_places)
        self._decode, self._chunks, self._draws, self._prompts = (
            {name: program.result() for name, program in group.items()} for group in (decode, chunks, draws, prompts)
        )
        self._adjust_row = adjust_row.result()
        self._put = None if put is None else put.result()
        self.count = compiler.count
        self._head = model.head.get_value()

    def decode(
        self, state: DeviceState, places: AdapterPlaces | None, step: Int32[Array, "B 4"]
    ) -> Float[Array, "B V"]:
        """decode_step, of the state in place."""
        logits, state.pages = self._decode[len(step)](
            self._weights.leaves, places, state.pages, state.tokens, state.options, step
        )
        return logits

    def prefill(
        self, state: DeviceState, places: AdapterPlaces | None, tokens: int, upload: Int32[Array, " N"]
    ) -> tuple[Float[Array, "S V"], Float[Array, "T H"], Int32[Array, "S 4"]]:
        """prefill_chunk, of the state in place; (logits, hidden, rows)."""
        logits, hidden, rows, state.pages, state.options = self._chunks[tokens](
            self._weights.leaves, places, state.pages, state.options, upload
        )
        return logits, hidden, rows

    def draw(
        self, drawing: Drawing, state: DeviceState, logits: Float[Array, "B V"], step: Int32[Array, "B 4"]
    ) -> Int32[Array, "B _"]:
        """draw, of the state in place; the rows' results."""
        own = (state.adjustments,) if drawing == "everything" else ()
        result, state.tokens, adjustments = self._draws[drawing, len(step)](
            logits, state.tokens, state.options, step, *own
        )
        if adjustments is not None:
            state.adjustments = adjustments
        return result

    def prompt_logprobs(self, hidden: Float[Array, "T H"], targets: Int32[np.ndarray, " T"]) -> Int32[Array, "T W"]:
        """prompt_logprob_rows of a chunk."""
        return self._prompts[len(targets)](hidden, self._head, targets)

    def adjust_row(
        self,
        state: DeviceState,
        row: int,
        counts: Int32[np.ndarray, " V"],
        bias_tokens: Int32[np.ndarray, " N"],
        biases: Float[np.ndarray, " N"],
    ) -> None:
        """put_adjustments, of the state in place."""
        state.adjustments = self._adjust_row(state.adjustments, np.int32(row), counts, bias_tokens, biases)

    def put_adapter(self, places: AdapterPlaces, layer: LoraWeights, index: int, place: int) -> AdapterPlaces:
        """AdapterPlaces.put, of places that are given up."""
        assert self._put is not None
        return self._put(places, layer, np.int32(index), np.int32(place))


def row_of(leaf: Array, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    """The form of one row of an array."""
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


class Compiler:
    """Compiles programs beside each other, as XLA lets other threads run while it does."""

    def __enter__(self) -> "Compiler":
        self.count = 0
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        donated: tuple[int, ...] = (),
        results: Any = None,
    ) -> Future[Callable[..., Any]]:
        """The program of a function for arguments of these forms, some of which are given up to it.

        results: their shardings; None on one device.
        """
        self.count += 1
        lowered = jax.jit(function, donate_argnums=donated, out_shardings=results).lower(*arguments)
        return self._pool.submit(lowered.compile)
