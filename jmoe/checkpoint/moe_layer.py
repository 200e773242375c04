"""One mixture-of-experts layer of a checkpoint."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jmoe.checkpoint.config_file import Config
from jmoe.checkpoint.directory import Checkpoint, check_specs
from jmoe.checkpoint.tensors import Spec
from jmoe.ops.experts import Experts
from jmoe.ops.mxfp4 import BLOCK, Mxfp4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeLayer:
    """One layer's mixture of experts with the norm before it; a pytree with a static config.

    norm_weight: bf16 [H]; router_weight: bf16 [E, H]; router_bias: bf16 [E].
    experts: MXFP4 as in the file, or bf16 where the checkpoint is not quantised; biases bf16.
    """

    config: Config = dataclasses.field(metadata={"static": True})
    norm_weight: Float[Array, " H"]
    router_weight: Float[Array, "E H"]
    router_bias: Float[Array, " E"]
    experts: Experts


def load_moe_layer(
    checkpoint: Checkpoint,
    layer: int,
    *,
    on_host: bool = False,
    read_dense: Callable[[Checkpoint, str], Any] | None = None,
) -> MoeLayer:
    """Reads layer `layer`, 0 <= layer < num_hidden_layers; its arrays are numpy's if they are to stay on the host.

    Experts may be packed (`*_blocks`, `*_scales`) or dense: under their plain name, or under the name `*_blocks`, where
    transformers 5 up to 5.23 writes them when it saves a model that it has dequantised. A dense matrix is [in, out], as
    Hugging Face has it, or [out, in]: its shape tells, and if it is square the other projection's.

    Args:
      read_dense: what stands in the layer for dense experts of this name; None: their values.

    Raises:
      ValueError: the layer is out of range; or tensors are missing or do not have the dtype and shape that config.json
        calls for (all are listed: name, wanted, got).
      FileNotFoundError: a shard that holds one of the layer's tensors does not exist.
    """
    config = checkpoint.config
    if not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"layer must be in [0, {config.num_hidden_layers}) for {checkpoint.path}, got {layer}")
    prefix = f"model.layers.{layer}."
    norm, router, mlp = f"{prefix}post_attention_layernorm.weight", f"{prefix}mlp.router.", f"{prefix}mlp.experts."
    gate_up, down, others = moe_specs(checkpoint.config, layer, checkpoint.is_packed)
    check_specs(checkpoint, others | gate_up | down)

    def read(name: str) -> Any:
        return checkpoint.tensor(name)

    def read_weight(names: dict[str, Spec]) -> Any:
        if len(names) == 2:
            return Mxfp4(*map(read, names))
        (name,) = names
        return read(name).swapaxes(1, 2) if read_dense is None else read_dense(checkpoint, name)

    moe = MoeLayer(
        config=config,
        norm_weight=read(norm),
        router_weight=read(f"{router}weight"),
        router_bias=read(f"{router}bias"),
        experts=Experts(
            gate_up=read_weight(gate_up),
            gate_up_bias=read(f"{mlp}gate_up_proj_bias"),
            down=read_weight(down),
            down_bias=read(f"{mlp}down_proj_bias"),
        ),
    )
    return moe if on_host else jax.tree.map(jnp.asarray, moe)


def moe_specs(
    config: Config, layer: int, is_packed: Callable[[str], bool]
) -> tuple[dict[str, Spec], dict[str, Spec], dict[str, Spec]]:
    """The headers that a layer's gate_up, its down, and its norm, router and biases must have in a checkpoint's view.

    is_packed: whether the weight of this name is in MXFP4.
    """
    experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
    prefix = f"model.layers.{layer}."
    norm, router, mlp = f"{prefix}post_attention_layernorm.weight", f"{prefix}mlp.router.", f"{prefix}mlp.experts."
    gate_up_name, down_name = f"{mlp}gate_up_proj", f"{mlp}down_proj"
    gate_up = _weight_specs(gate_up_name, experts, 2 * inner, hidden, packed=is_packed(gate_up_name))
    down = _weight_specs(down_name, experts, hidden, inner, packed=is_packed(down_name))
    others = {
        norm: Spec("BF16", (hidden,)),
        f"{router}weight": Spec("BF16", (experts, hidden)),
        f"{router}bias": Spec("BF16", (experts,)),
        f"{mlp}gate_up_proj_bias": Spec("BF16", (experts, 2 * inner)),
        f"{mlp}down_proj_bias": Spec("BF16", (experts, hidden)),
    }
    return gate_up, down, others


def _weight_specs(name: str, experts: int, rows: int, columns: int, *, packed: bool) -> dict[str, Spec]:
    """The tensors that must hold one projection, dense or in MXFP4."""
    if not packed:
        return {name: Spec("BF16", (experts, columns, rows))}
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    if columns % BLOCK:
        raise ValueError(f"{blocks} packs blocks of {BLOCK} values, so its input size cannot be {columns}")
    groups = columns // BLOCK
    return {blocks: Spec("U8", (experts, rows, groups, BLOCK // 2)), scales: Spec("U8", (experts, rows, groups))}


def router_logits(layer: MoeLayer, x: Float[Array, "... H"]) -> Float[Array, "... E"]:
    """x @ router_weight.T + router_bias for normalised x: summed in float32, rounded once to x's dtype."""
    logits = jnp.einsum(
        "...h,eh->...e",
        x,
        layer.router_weight.astype(x.dtype),
        precision=lax.Precision.HIGHEST,  # float32 x: a GPU would round to TF32
        preferred_element_type=jnp.float32,
    )
    return (logits + jnp.broadcast_to(layer.router_bias.astype(jnp.float32), logits.shape)).astype(x.dtype)
