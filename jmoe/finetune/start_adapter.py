"""The adapter that a run starts from: a new one, or one that is there already."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.adapters.settings import Settings
from jmoe.finetune.config import FinetuneConfig, parse_ranks
from jmoe.gpt_oss.adapter import load_adapter
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.new_adapter import new_adapter
from jmoe.gpt_oss.weights import ATTENTION, TARGETS, LoraWeights


def start_adapter(options: FinetuneConfig, config: Config) -> LoraWeights:
    """A new adapter, or with options.adapter that one's factors in float32, to be trained on.

    Its targets, ranks and scales stay; layers and targets that it has no LoRA on stay without.

    Raises:
      FileNotFoundError: the adapter's directory or a file of it does not exist.
      ValueError: it does not fit the model, or options have other targets, ranks or scales than it; the run would
        overwrite it.
    """
    if options.adapter is None:
        return new_adapter(
            config,
            rank=options.lora_ranks,
            scale=options.lora_scales,
            targets=options.lora_targets,
            seed=options.seed,
        )
    if Path(options.adapter).resolve() == (Path(options.out) / "adapter").resolve():
        raise ValueError(f"the run would overwrite {options.adapter}, from which it starts: choose another out")
    lora = load_adapter(options.adapter, config, lora_b_layout=options.lora_b_layout)
    check_agreement(options, lora)
    return LoraWeights(
        *(jax.tree.map(lambda factor: jnp.asarray(factor, jnp.float32), part) for part in (lora.a, lora.b, lora.scale))
    )


def check_agreement(options: FinetuneConfig, lora: LoraWeights) -> None:
    """Raises ValueError if options that are given are not what the adapter has."""
    ranks = {target: lora.a[target].shape[-2] for target in TARGETS if target in lora.a}
    wrong = []
    if options.targets is not None and set(options.lora_targets) != set(ranks):
        wrong.append(f"targets {options.targets}")
    own = parse_ranks(options.ranks)
    if any(ranks.get(target) != rank for target, rank in own.items()):
        wrong.append(f"ranks {options.ranks}")
    if options.rank is not None and any(ranks[target] != options.rank for target in ranks if target not in own):
        wrong.append(f"rank {options.rank}")
    if options.alpha is not None and not has_scales(lora, {t: options.scale_at(rank) for t, rank in ranks.items()}):
        wrong.append(f"alpha {options.alpha:g}{' with rslora' if options.rslora else ''}")
    if options.rslora and options.alpha is None and not written_as_rslora(Path(options.adapter or "")):
        wrong.append("rslora")
    if options.lora_dropout and not set(ranks) & set(ATTENTION):
        wrong.append(f"lora_dropout {options.lora_dropout:g}, which acts on attention alone")
    if wrong:
        raise ValueError(
            f"{options.adapter} is an adapter with {description(lora)}, which stay as they are; leave out what "
            f"differs: {'; '.join(wrong)}"
        )


def has_scales(lora: LoraWeights, wanted: Mapping[str, float]) -> bool:
    """Whether every layer's LoRA has its target's scale; layers without LoRA have the scale 0."""
    return all(
        bool(np.all((scale == 0) | np.isclose(scale, wanted[target], rtol=1e-6, atol=0)))
        for target, scale in ((target, np.asarray(scale)) for target, scale in lora.scale.items())
    )


def written_as_rslora(adapter: Path) -> bool:
    """Whether an adapter's file says that its scales are alpha / sqrt(r)."""
    return Settings.load(adapter / "adapter_config.json").use_rslora


def description(lora: LoraWeights) -> str:
    """Targets, ranks and scales, in words."""
    kinds: dict[str, list[str]] = {}
    for target in TARGETS:
        if target not in lora.a:
            continue
        scale = np.asarray(lora.scale[target])
        scales = sorted(set(scale[scale != 0].tolist()))
        layers, there = scale.shape[0], int((scale != 0).sum())
        said = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}" if scales else "0"
        some = "" if there == layers else f" in {there} of {layers} layers"
        kinds.setdefault(f"(rank {lora.a[target].shape[-2]}, scale {said}{some})", []).append(target)
    return ", ".join(f"{'+'.join(targets)} {kind}" for kind, targets in kinds.items())
