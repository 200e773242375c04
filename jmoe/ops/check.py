"""What jmoe.moe refuses, before anything is traced or launched."""

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.ops.check_weight import check_float, check_shape, check_weight
from jmoe.ops.experts import Experts, Lora, adapter_count
from jmoe.ops.routing import Routing, check_top_k
from jmoe.ops.target import Target


def check_moe(
    x: jax.Array,
    router_logits: jax.Array | None,
    experts: Experts,
    top_k: int,
    lora: Lora | None,
    adapter_ids: jax.Array | None,
    routing: Routing | None,
    expert_offset: jax.Array | int,
) -> None:
    """Raises ValueError if the arguments of jmoe.moe do not fit together: what is wrong, what was wanted, what came."""
    for name, array in (("x", x), ("router_logits", router_logits), ("adapter_ids", adapter_ids)):
        if array is not None and not hasattr(array, "shape"):
            raise ValueError(f"{name} must be an array, got {type(array).__name__}")
    if x.ndim < 1:
        raise ValueError(f"x must have rank 1 or more [..., H], got shape {x.shape}")
    check_float("x", x)
    count, hidden = check_experts(experts)
    if x.shape[-1] != hidden:
        raise ValueError(f"x must have inner size {hidden} like the experts' H, got shape {x.shape}")
    tokens = x.shape[:-1]
    if routing is not None:
        check_routing(routing, tokens, top_k)
    elif router_logits is None:
        raise ValueError("router_logits may be None only when routing is given")
    else:
        check_float("router_logits", router_logits)
        if router_logits.shape[:-1] != tokens or router_logits.ndim != x.ndim:
            raise ValueError(f"router_logits must be {(*tokens, 'E')} to match x {x.shape}, got {router_logits.shape}")
        if router_logits.shape[-1] < count:
            raise ValueError(
                f"router_logits must have a column for each of the {count} experts, got shape {router_logits.shape}"
            )
        check_top_k(top_k, router_logits.shape[-1])
    check_lora(lora, experts)
    check_adapter_ids(adapter_ids, lora, tokens)
    check_integer("expert_offset", expert_offset, shapes=((), (1,)))


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
    check_integer("layer", layer)
    if not isinstance(layer, jax.core.Tracer) and not 0 <= int(layer) < count:
        raise ValueError(f"layer must be in [0, {count}), got {layer}")
    one, one_lora = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)
    return one, one_lora if stacked[1] is not None else lora


def check_integer(name: str, value: jax.Array | int, shapes: tuple[tuple[int, ...], ...] = ((),)) -> None:
    """Raises ValueError unless the value is an integer or an array of one of these shapes."""
    if jnp.shape(value) not in shapes or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"{name} must be an integer scalar, got {value!r}")


def check_backend(backend: object) -> None:
    """Raises ValueError unless jmoe.moe knows the backend."""
    if not (backend in (None, "triton", "xla") or isinstance(backend, Target)):
        raise ValueError(f'backend must be "triton", "xla", a jmoe.Target or None, got {backend!r}')


def check_experts(experts: Experts) -> tuple[int, int]:
    """(E, H). Raises ValueError unless gate_up [E, 2I, H], down [E, H, I] and their biases agree."""
    check_weight("experts.gate_up", experts.gate_up)
    check_weight("experts.down", experts.down)
    count, double, hidden = experts.gate_up.shape
    if count < 1:
        raise ValueError(f"experts.gate_up must hold at least one expert, got shape {experts.gate_up.shape}")
    if double % 2:
        raise ValueError(f"experts.gate_up must have an even number of rows 2I, got shape {experts.gate_up.shape}")
    if experts.down.shape != (count, hidden, double // 2):
        raise ValueError(
            f"experts.down must have shape {(count, hidden, double // 2)} to match experts.gate_up "
            f"{experts.gate_up.shape}, got {experts.down.shape}"
        )
    for name, bias, size in (("gate_up_bias", experts.gate_up_bias, double), ("down_bias", experts.down_bias, hidden)):
        if bias is not None:
            check_float(f"experts.{name}", bias)
            check_shape(f"experts.{name}", bias, (count, size))
    return count, hidden


def check_routing(routing: Routing, tokens: tuple[int, ...], top_k: int) -> None:
    """Raises ValueError unless top_k is positive and the routing is int32 and float32 [..., k] for these tokens."""
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    for name, array, dtype in (
        ("experts", routing.experts, jnp.int32),
        ("weights", routing.weights, jnp.float32),
    ):
        check_shape(f"routing.{name}", array, (*tokens, top_k))
        if array.dtype != dtype:
            raise ValueError(f"routing.{name} must be {jnp.dtype(dtype)}, got {array.dtype}")


def check_lora(lora: Lora | None, experts: Experts) -> None:
    """Raises ValueError unless every projection's A, B and scale agree with each other and with the experts."""
    if lora is None:
        return
    for projection in ("gate_up", "down"):
        scale = getattr(lora, f"{projection}_scale")
        if scale is not None and jnp.ndim(scale) != 1:
            raise ValueError(f"lora.{projection}_scale must have rank 1 [A], got shape {jnp.shape(scale)}")
    adapters = adapter_count(lora)
    for projection in ("gate_up", "down"):
        a, b, scale = (getattr(lora, f"{projection}_{part}") for part in ("a", "b", "scale"))
        given = [part is not None for part in (a, b, scale)]
        if not any(given):
            continue
        if not all(given):
            raise ValueError(f"lora.{projection}_a, _b and _scale must be given together or not at all")
        count, n, k = getattr(experts, projection).shape
        check_float(f"lora.{projection}_a", a)
        check_float(f"lora.{projection}_b", b)
        if a.ndim != 4 or b.ndim != 4:
            raise ValueError(
                f"lora.{projection}_a and _b must have rank 4 [A, E, r, {k}] and [A, E, {n}, r], "
                f"got shapes {a.shape} and {b.shape}"
            )
        if a.shape[2] != b.shape[3]:
            raise ValueError(
                f"lora.{projection}_a and _b must have one rank, "
                f"got {a.shape[2]} (A {a.shape}) and {b.shape[3]} (B {b.shape})"
            )
        rank = a.shape[2]
        if adapters < 1 or rank < 1:
            raise ValueError(
                f"lora.{projection}_a must hold at least one adapter of rank 1 or more, got shape {a.shape}"
            )
        check_shape(f"lora.{projection}_a", a, (adapters, count, rank, k))
        check_shape(f"lora.{projection}_b", b, (adapters, count, n, rank))
        check_shape(f"lora.{projection}_scale", scale, (adapters,))
        if scale.dtype != jnp.float32:
            raise ValueError(f"lora.{projection}_scale must be float32, got {scale.dtype}")


def check_adapter_ids(adapter_ids: jax.Array | None, lora: Lora | None, tokens: tuple[int, ...]) -> None:
    """Raises ValueError unless the ids are int32 [...], belong to a Lora, and lie in it if they are concrete."""
    adapters = 0 if lora is None else adapter_count(lora)
    if adapter_ids is None:
        if adapters > 1:
            raise ValueError(f"adapter_ids must be given with a Lora of {adapters} adapters, got None")
        return
    if adapters == 0:
        raise ValueError("adapter_ids were given without lora: there is no adapter they could name")
    check_shape("adapter_ids", adapter_ids, tokens)
    if adapter_ids.dtype != jnp.int32:
        raise ValueError(f"adapter_ids must be int32, got {adapter_ids.dtype}")
    if adapter_ids.size and not isinstance(adapter_ids, jax.core.Tracer):
        ids = np.asarray(adapter_ids)
        if ids.min() < -1 or ids.max() >= adapters:
            raise ValueError(
                f"adapter_ids must be between -1 (no adapter) and {adapters - 1}, "
                f"got values from {ids.min()} to {ids.max()}"
            )
