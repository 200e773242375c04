"""The mixture-of-experts layer as a Flax module."""

import math
from typing import Any, Literal, Self, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from jmoe.checkpoint import MoeLayer, read_hf_block
from jmoe.checkpoint.hf_block import Family
from jmoe.nn.lora import PROJECTIONS, LoraConfig, new_lora
from jmoe.nn.shared import SharedExperts
from jmoe.nn.statistics import RouterStatistics, router_statistics
from jmoe.nn.variables import Frozen
from jmoe.ops.check import as_count, check_array, check_experts, check_lora, check_options
from jmoe.ops.experts import Experts, Lora
from jmoe.ops.mesh_axes import MeshAxes
from jmoe.ops.moe import Backend, moe
from jmoe.ops.mxfp4 import Mxfp4, PackedMxfp4, quantize
from jmoe.ops.packed import pack as pack_experts
from jmoe.ops.routing import Routing, route
from jmoe.triton_src.activation import SiluAndMul, SwiGLU
from jmoe.triton_src.scoring import Scoring


class MoE(nnx.Module):
    """Router, experts and LoRA of one layer.

    Variables: `router_kernel` [H, E], `router_bias` [E] and `choice_bias` [E]; `gate_up`, `gate_up_bias`, `down`,
    `down_bias` as in jmoe.Experts, and `shared` those of SharedExperts; of each projection with LoRA `gate_up_a`,
    `gate_up_b`, `gate_up_scale` and so on as in jmoe.Lora. A and B are nnx.LoRAParam. The rest is Frozen, but for what
    train_router and train_experts make nnx.Param.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        *,
        top_k: int,
        rngs: nnx.Rngs,
        experts: Experts | None = None,
        router_kernel: Float[Array, "H E"] | None = None,
        router_bias: Float[Array, " E"] | None = None,
        mxfp4: bool = True,
        lora: LoraConfig | Lora | None = None,
        train_router: bool = False,
        train_experts: bool = False,
        scoring: Scoring = Scoring(),
        choice_bias: Float[Array, " E"] | None = None,
        shared: Experts | None = None,
        shared_gate: Float[Array, "H S"] | None = None,
        activation: SwiGLU = SwiGLU(),
        recompute: bool = False,
        mesh_axes: MeshAxes | None = None,
        backend: Backend = None,
    ) -> None:
        """A layer with these weights, or with random ones.

        Args:
          hidden: H; for MXFP4 a multiple of 32.
          intermediate: I; for MXFP4 a multiple of 32.
          num_experts: E.
          top_k: experts a token.
          rngs: the stream "params" draws what is random.
          experts: the weights; None draws them with variance 1 / inputs, and biases of zero.
          router_kernel: the router's; None draws it likewise, and a bias of zero.
          router_bias: beside router_kernel; None: the router has no bias.
          mxfp4: whether random experts are rounded to MXFP4, or stay bfloat16.
          lora: new adapters, or loaded ones; None: without.
          train_router: the router's variables are nnx.Param.
          train_experts: the experts' variables are nnx.Param, the shared ones' too; for bfloat16 or float32 ones alone.
          scoring: as in jmoe.moe.
          choice_bias: as in jmoe.moe.
          shared: S experts that every token uses too, of any I and without LoRA; see SharedExperts.
          shared_gate: whose sigmoids weight these; None: each counts as it is.
          activation: as in jmoe.moe.
          recompute: as in jmoe.moe.
          mesh_axes: as in jmoe.moe.
          backend: as in jmoe.moe.

        Raises:
          ValueError: train_experts with MXFP4 experts, which are constants; sizes, top_k or adapters that do not fit
            the weights.
        """
        self.top_k = as_count("top_k", top_k, num_experts)
        self.scoring = scoring
        self.activation = activation
        self.recompute = recompute
        self.mesh_axes = mesh_axes
        self.backend = backend
        if experts is None:
            experts = random_experts(hidden, intermediate, num_experts, mxfp4, rngs)
        check_sizes(experts, hidden, intermediate, num_experts)
        check_options(experts, activation, backend, scoring=scoring, choice_bias=choice_bias, columns=num_experts)
        if router_kernel is None:
            router_kernel = normal(rngs, (hidden, num_experts), hidden)
            router_bias = jnp.zeros(num_experts, jnp.bfloat16) if router_bias is None else router_bias
        if router_kernel.shape != (hidden, num_experts):
            raise ValueError(f"router_kernel must be [H, E] = {(hidden, num_experts)}, got {router_kernel.shape}")
        if router_bias is not None and router_bias.shape != (num_experts,):
            raise ValueError(f"router_bias must be [E] = {(num_experts,)}, got {router_bias.shape}")
        kind = nnx.Param if train_router else Frozen
        self.router_kernel = kind(router_kernel)
        self.router_bias = None if router_bias is None else kind(router_bias)
        self.choice_bias = None if choice_bias is None else Frozen(choice_bias)
        given = [one for one in (experts, shared) if one is not None]
        if train_experts and any(isinstance(getattr(e, p), Mxfp4 | PackedMxfp4) for e in given for p in PROJECTIONS):
            raise ValueError(
                "train_experts must be False with MXFP4 experts, which are constants: train LoRA on them, or "
                "jmoe.dequantize them first (packed ones after jmoe.unpack)"
            )
        kind = nnx.Param if train_experts else Frozen
        for name in ("gate_up", "gate_up_bias", "down", "down_bias"):
            value = getattr(experts, name)
            setattr(self, name, None if value is None else nnx.data(kind(value)))
        if shared is not None:
            check_options(shared, activation, backend)
            options: dict[str, Any] = {"recompute": recompute, "mesh_axes": mesh_axes, "backend": backend}
            module = SharedExperts(shared, shared_gate, hidden, train_experts, activation=activation, **options)
        elif shared_gate is not None:
            raise ValueError("shared_gate was given without shared experts")
        self.shared: SharedExperts | None = None if shared is None else nnx.data(module)
        if isinstance(lora, LoraConfig):
            lora = new_lora(lora, hidden=hidden, intermediate=intermediate, experts=num_experts, rngs=rngs)
        check_lora(lora, num_experts, hidden, intermediate)
        for projection in PROJECTIONS:
            for part in ("a", "b", "scale"):
                value = getattr(lora, f"{projection}_{part}", None)
                kind = Frozen if part == "scale" else nnx.LoRAParam
                setattr(self, f"{projection}_{part}", None if value is None else nnx.data(kind(value)))

    @classmethod
    def from_weights(
        cls,
        experts: Experts,
        router_kernel: Float[Array, "H E"],
        router_bias: Float[Array, " E"] | None = None,
        *,
        top_k: int,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ) -> Self:
        """A layer with these weights; sizes are theirs, options those of the constructor.

        Raises:
          ValueError: `lora` is a LoraConfig and there are no rngs: a seed of our own would give the adapters of every
            layer the same A. And as the constructor does.
        """
        if rngs is None and isinstance(options.get("lora"), LoraConfig):
            raise ValueError("rngs must be given with lora=LoraConfig(...), whose A is random, got None")
        num_experts, hidden, intermediate = experts.down.shape
        return cls(
            hidden,
            intermediate,
            num_experts,
            top_k=top_k,
            rngs=nnx.Rngs(0) if rngs is None else rngs,
            experts=experts,
            router_kernel=router_kernel,
            router_bias=router_bias,
            **options,
        )

    @classmethod
    def from_checkpoint_layer(cls, layer: MoeLayer, *, rngs: nnx.Rngs | None = None, **options: Any) -> Self:
        """The layer that jmoe.checkpoint.load_moe_layer read: its weights, top_k and activation.

        The norm before it (`layer.norm_weight`) is not part of it. Options are the constructor's others, as lora, which
        may be jmoe.adapters.load_lora's. Raises as from_weights does.
        """
        return cls.from_weights(
            layer.experts,
            layer.router_weight.T,
            layer.router_bias,
            top_k=layer.config.num_experts_per_tok,
            rngs=rngs,
            activation=layer.config.activation,
            **options,
        )

    @classmethod
    def from_hf(
        cls,
        block: Any,
        *,
        family: Family,
        layer: int | None = None,
        top_k: int | None = None,
        scoring: Scoring | None = None,
        mxfp4: bool = True,
        pack: bool = False,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ) -> Self:
        """The block of a Qwen3-MoE or Mixtral model: of its checkpoint's files, its tensors, or transformers' module.

        Args:
          block: as in jmoe.checkpoint.read_hf_block, as are the next five.
          family: the model's kind.
          layer: which block, where there are several.
          top_k: experts a token; None: what config.json or the module says.
          scoring: how logits become weights; None: likewise, or what the family always does.
          mxfp4: whether experts are rounded to MXFP4.
          pack: the experts are packed for Hopper, as by jmoe.pack.
          rngs: for new adapters, if `lora` asks for them.
          options: the constructor's others.

        Raises: as jmoe.checkpoint.read_hf_block and from_weights do.
          ValueError: pack of experts that are not in MXFP4.
        """
        if pack and not mxfp4:
            raise ValueError("pack=True packs experts in MXFP4, and mxfp4=False keeps them as they are")
        read = read_hf_block(block, family=family, layer=layer, top_k=top_k, scoring=scoring, mxfp4=mxfp4)
        experts = pack_experts(read.experts) if pack else read.experts
        family_options: dict[str, Any] = {"scoring": read.scoring, "activation": SiluAndMul()}
        options = family_options | options
        return cls.from_weights(experts, read.router_weight.T, top_k=read.top_k, rngs=rngs, **options)

    @property
    def experts(self) -> Experts:
        """The experts' weights."""
        return Experts(*(value_of(getattr(self, name)) for name in ("gate_up", "gate_up_bias", "down", "down_bias")))

    @property
    def lora(self) -> Lora | None:
        """The adapters, or None."""
        names = [f"{projection}_{part}" for projection in PROJECTIONS for part in ("a", "b", "scale")]
        parts = {name: value_of(getattr(self, name)) for name in names}
        return None if all(part is None for part in parts.values()) else Lora(**parts)

    def router_logits(self, x: Float[Array, "... H"]) -> Float[Array, "... E"]:
        """x @ router_kernel + router_bias, summed in float32 and rounded once to x's dtype.

        Raises:
          ValueError: x is not bfloat16 or float32 [..., H].
        """
        check_array("x", x)
        kernel = self.router_kernel.get_value().astype(x.dtype)
        if x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
            raise ValueError(f"x must have inner size {kernel.shape[0]} like the router's H, got shape {x.shape}")
        logits = jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        if self.router_bias is not None:
            logits += self.router_bias.get_value().astype(jnp.float32)
        return logits.astype(x.dtype)

    def route(self, x: Float[Array, "... H"]) -> Routing:
        """The choice of experts for x, to record and replay."""
        return self._route(self.router_logits(x))

    def _route(self, logits: Float[Array, "... E"]) -> Routing:
        return route(logits, self.top_k, scoring=self.scoring, choice_bias=value_of(self.choice_bias))

    @overload
    def __call__(
        self,
        x: Float[Array, "... H"],
        *,
        adapter_ids: Int32[Array, "..."] | None = None,
        routing: Routing | None = None,
        statistics: Literal[False] = False,
    ) -> Float[Array, "... H"]: ...

    @overload
    def __call__(
        self,
        x: Float[Array, "... H"],
        *,
        adapter_ids: Int32[Array, "..."] | None = None,
        routing: Routing | None = None,
        statistics: Literal[True],
    ) -> tuple[Float[Array, "... H"], RouterStatistics]: ...

    def __call__(
        self,
        x: Float[Array, "... H"],
        *,
        adapter_ids: Int32[Array, "..."] | None = None,
        routing: Routing | None = None,
        statistics: bool = False,
    ) -> Any:
        """y like x; with `statistics`, (y, RouterStatistics).

        adapter_ids: int32 [...], as in jmoe.moe.
        routing: a recorded choice to follow instead of the router's own; the router then has no gradient, but for what
          the statistics' loss gives it.

        Raises: as jmoe.moe.
        """
        logits = self.router_logits(x) if routing is None or statistics else None
        y = moe(
            x,
            logits if routing is None else None,
            self.experts,
            top_k=self.top_k,
            lora=self.lora,
            adapter_ids=adapter_ids,
            routing=routing,
            scoring=self.scoring,
            choice_bias=value_of(self.choice_bias),
            activation=self.activation,
            recompute=self.recompute,
            mesh_axes=self.mesh_axes,
            backend=self.backend,
        )
        if self.shared is not None:
            y += self.shared(x)
        if logits is None or not statistics:
            return y
        return y, router_statistics(logits, self._route(logits) if routing is None else routing, self.scoring)


def value_of(variable: nnx.Variable | None) -> Any:
    """What a variable holds; None for none."""
    return None if variable is None else variable.get_value()


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], inputs: int) -> Array:
    """bfloat16 of variance 1 / inputs."""
    return (jax.random.normal(rngs.params(), shape) / math.sqrt(inputs)).astype(jnp.bfloat16)


def random_experts(hidden: int, intermediate: int, num_experts: int, mxfp4: bool, rngs: nnx.Rngs) -> Experts:
    """Experts of random weights and zero biases."""
    gate_up = normal(rngs, (num_experts, 2 * intermediate, hidden), hidden)
    down = normal(rngs, (num_experts, hidden, intermediate), intermediate)
    zeros = [jnp.zeros((num_experts, n), jnp.bfloat16) for n in (2 * intermediate, hidden)]
    if mxfp4:
        return Experts(quantize(gate_up), zeros[0], quantize(down), zeros[1])
    return Experts(gate_up, zeros[0], down, zeros[1])


def check_sizes(experts: Experts, hidden: int, intermediate: int, num_experts: int) -> None:
    """Raises ValueError unless the experts' arrays fit together and have these sizes."""
    check_experts(experts)
    wanted = {"gate_up": (num_experts, 2 * intermediate, hidden), "down": (num_experts, hidden, intermediate)}
    for name, shape in wanted.items():
        weight: Mxfp4 | PackedMxfp4 | Array = getattr(experts, name)
        if weight.shape != shape:
            raise ValueError(f"experts.{name} must stand for {shape}, got {weight.shape}")
