"""What jmoe.moe and what goes into it refuse, before anything is traced or launched."""

import operator
from typing import TYPE_CHECKING, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mxfp4 import BLOCK, TILE, Mxfp4, PackedMxfp4
from jmoe.ops.target import Target
from jmoe.triton_src.activation import check_activation
from jmoe.triton_src.scoring import Scoring, not_a_scoring

if TYPE_CHECKING:
    from jmoe.ops.call import Tokens

FLOATS = ("bfloat16", "float32")


def check_array(
    name: str, array: jax.Array, shape: tuple[int | str, ...] | None = None, dtypes: tuple[str, ...] = FLOATS
) -> None:
    """Raises ValueError unless the array has one of these dtypes and this shape.

    shape: sizes, or names of axes that may have any size; None: any shape.
    """
    if shape is not None:
        named = any(isinstance(size, str) for size in shape)
        if named and jnp.ndim(array) != len(shape):
            axes = ", ".join(map(str, shape))
            raise ValueError(f"{name} must have rank {len(shape)} [{axes}], got shape {jnp.shape(array)}")
        if not named and array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if array.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(dtypes)}, got {array.dtype}")


def check_weight(name: str, weight: Mxfp4 | PackedMxfp4 | jax.Array) -> tuple[int, ...]:
    """(E, N, K). Raises ValueError unless the weight is well-formed MXFP4, packed or not, or floating of rank 3."""
    match weight:
        case Mxfp4(blocks, scales):
            check_array(f"{name}.scales", scales, ("E", "N", f"K/{BLOCK}"), ("uint8",))
            check_array(f"{name}.blocks", blocks, (*scales.shape, BLOCK // 2), ("uint8",))
            return *scales.shape[:2], scales.shape[2] * BLOCK
        case PackedMxfp4(words, scales, n, k):
            check_array(f"{name}.words", words, ("E", f"N/{TILE}", f"K/{TILE}", 512), ("int32",))
            tiles = (words.shape[0], -(-n // TILE), -(-k // TILE))
            check_array(f"{name}.words", words, (*tiles, 512), ("int32",))
            check_array(f"{name}.scales", scales, (*tiles, 32), ("int32",))
            if k % BLOCK:
                raise ValueError(f"{name}.k must be a multiple of {BLOCK}, got {k}")
            return words.shape[0], n, k
    check_array(name, weight, ("E", "N", "K"))
    return weight.shape


def check_experts(experts: Experts) -> tuple[int, int, int]:
    """(E, H, I). Raises ValueError unless gate_up [E, 2I, H], down [E, H, I] and their biases agree."""
    gate_up, down = check_weight("experts.gate_up", experts.gate_up), check_weight("experts.down", experts.down)
    count, double, hidden = gate_up
    if count < 1:
        raise ValueError(f"experts.gate_up must hold at least one expert, got shape {gate_up}")
    if double % 2:
        raise ValueError(f"experts.gate_up must have an even number of rows 2I, got shape {gate_up}")
    if down != (count, hidden, double // 2):
        raise ValueError(
            f"experts.down must have shape {(count, hidden, double // 2)} to match experts.gate_up {gate_up}, "
            f"got {down}"
        )
    for name, bias, size in (("gate_up_bias", experts.gate_up_bias, double), ("down_bias", experts.down_bias, hidden)):
        if bias is not None:
            check_array(f"experts.{name}", bias, (count, size))
    return count, hidden, double // 2


def check_lora(lora: Lora | None, experts: int, hidden: int, intermediate: int) -> int:
    """The number of adapters, 0 if no projection has LoRA.

    Raises ValueError unless every projection's A, B and scale agree with each other and with the experts' sizes.
    """
    adapters = 0
    for projection, n, k in (("gate_up", 2 * intermediate, hidden), ("down", hidden, intermediate)):
        name = f"lora.{projection}"
        a, b, scale = [getattr(lora, f"{projection}_{part}", None) for part in ("a", "b", "scale")]
        if a is None and b is None and scale is None:
            continue
        if a is None or b is None or scale is None:
            raise ValueError(f"{name}_a, _b and _scale must be given together or not at all")
        check_array(f"{name}_scale", scale, ("A",), ("float32",))
        if a.ndim != 4 or b.ndim != 4:
            raise ValueError(
                f"{name}_a and _b must have rank 4 [A, E, r, {k}] and [A, E, {n}, r], "
                f"got shapes {a.shape} and {b.shape}"
            )
        rank = a.shape[2]
        if rank != b.shape[3]:
            raise ValueError(
                f"{name}_a and _b must have one rank, got {rank} (A {a.shape}) and {b.shape[3]} (B {b.shape})"
            )
        adapters = adapters or scale.shape[0]
        if adapters < 1 or rank < 1:
            raise ValueError(f"{name}_a must hold at least one adapter of rank 1 or more, got shape {a.shape}")
        check_array(f"{name}_a", a, (adapters, experts, rank, k))
        check_array(f"{name}_b", b, (adapters, experts, n, rank))
        check_array(f"{name}_scale", scale, (adapters,), ("float32",))
    return adapters


def check_tokens(tokens: "Tokens", top_k: SupportsIndex, experts: int, hidden: int, adapters: int) -> int:
    """top_k as Python's int.

    Raises ValueError unless it and the arrays that have axes of tokens fit so many experts, inner size and adapters.
    """
    x, logits, routing = tokens.x, tokens.router_logits, tokens.routing
    for name, array in (("x", x), ("router_logits", logits), ("adapter_ids", tokens.adapter_ids)):
        if array is not None and not hasattr(array, "shape"):
            raise ValueError(f"{name} must be an array, got {type(array).__name__}")
    if x.ndim < 1:
        raise ValueError(f"x must have rank 1 or more [..., H], got shape {x.shape}")
    if x.shape[-1] != hidden:
        raise ValueError(f"x must have inner size {hidden} like the experts' H, got shape {x.shape}")
    check_array("x", x)
    axes = x.shape[:-1]
    check_adapter_ids(tokens.adapter_ids, adapters, axes)
    if routing is not None:
        top_k = as_count("top_k", top_k)
        check_array("routing.experts", routing.experts, (*axes, top_k), ("int32",))
        check_array("routing.weights", routing.weights, (*axes, top_k), ("float32",))
        return top_k
    if logits is None:
        raise ValueError("router_logits may be None only when routing is given")
    if logits.shape[:-1] != axes or logits.ndim != x.ndim:
        raise ValueError(f"router_logits must be {(*axes, 'E')} to match x {x.shape}, got {logits.shape}")
    check_array("router_logits", logits)
    if logits.shape[-1] < experts:
        raise ValueError(
            f"router_logits must have a column for each of the {experts} experts, got shape {logits.shape}"
        )
    return as_count("top_k", top_k, logits.shape[-1])


def check_adapter_ids(ids: jax.Array | None, adapters: int, axes: tuple[int, ...]) -> None:
    """Raises ValueError unless the ids are int32 [...], name adapters of a Lora, and lie among them if concrete."""
    if ids is None:
        if adapters > 1:
            raise ValueError(f"adapter_ids must be given with a Lora of {adapters} adapters, got None")
        return
    if adapters == 0:
        raise ValueError("adapter_ids were given without lora: there is no adapter they could name")
    check_array("adapter_ids", ids, axes, ("int32",))
    if ids.size and not isinstance(ids, jax.core.Tracer):
        least, most = np.min(np.asarray(ids)), np.max(np.asarray(ids))
        if least < -1 or most >= adapters:
            raise ValueError(
                f"adapter_ids must be between -1 (no adapter) and {adapters - 1}, got values from {least} to {most}"
            )


def as_count(name: str, value: SupportsIndex, experts: int | None = None) -> int:
    """The value as Python's int, which what is compiled can be looked up by.

    Raises ValueError if it is no integer (a bool, traced), below 1 or, where their number is given, above the experts.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value}")
    if experts is not None and not 1 <= count <= experts:
        raise ValueError(f"{name} must be between 1 and the number of experts ({experts}), got {count}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_options(
    experts: Experts,
    activation: object,
    backend: object,
    expert_offset: jax.Array | int = 0,
    *,
    scoring: object = Scoring(),
    choice_bias: jax.Array | None = None,
    columns: int = 0,
) -> None:
    """Raises ValueError unless the experts can have the activation, and the others are what jmoe.moe knows.

    columns: of the router's logits, each of which has a value in choice_bias if there is one.
    """
    if not isinstance(scoring, Scoring):
        raise ValueError(not_a_scoring(scoring))
    if choice_bias is not None:
        check_array("choice_bias", choice_bias, (columns,))
    check_activation(activation, isinstance(experts.gate_up, PackedMxfp4))
    if not (backend in (None, "triton", "xla") or isinstance(backend, Target)):
        raise ValueError(f'backend must be "triton", "xla", a jmoe.Target or None, got {backend!r}')
    if jnp.shape(expert_offset) not in ((), (1,)) or not jnp.issubdtype(jnp.result_type(expert_offset), jnp.integer):
        raise ValueError(f"expert_offset must be an integer scalar, got {expert_offset!r}")


def one_layer(experts: Experts, lora: Lora | None, layer: jax.Array | int) -> tuple[Experts, Lora | None]:
    """The shapes and dtypes of one layer of stacked experts, and of LoRA, stacked with them or not.

    Raises:
      ValueError: the layer does not exist or is not an integer, or the stack's arrays differ in their number of layers.
    """
    scales = [] if lora is None else [s for s in (lora.gate_up_scale, lora.down_scale) if s is not None]
    stacked = (experts, lora) if any(scale.ndim == 2 for scale in scales) else (experts, None)
    leaves = jax.tree.leaves(stacked)
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(counts) != 1:
        raise ValueError(
            f"with layer, the experts' arrays must have one leading axis of layers, got shapes "
            f"{[leaf.shape for leaf in leaves]}"
        )
    (count,) = counts
    if jnp.shape(layer) != () or not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
        raise ValueError(f"layer must be an integer scalar, got {layer!r}")
    if not isinstance(layer, jax.core.Tracer) and not 0 <= int(layer) < count:
        raise ValueError(f"layer must be in [0, {count}), got {layer}")
    one, one_lora = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)
    return one, one_lora if stacked[1] is not None else lora
