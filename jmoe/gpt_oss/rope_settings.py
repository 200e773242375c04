"""What config.json says about rotary positions, in either spelling of transformers."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from jmoe.checkpoint.config_file import in_json, number


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions, stretched by YaRN (arXiv 2309.00071) unless factor is 1; names as in the file."""

    rope_theta: float = 150000.0
    factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 4096
    truncate: bool = False


LEAST, MOST = 1e-30, 1e30
"""Of rope's numbers: between them float32 has the frequencies that they give."""

STRETCH = ("attention_factor", "mscale", "mscale_all_dim")
"""What may say again how much attention's logits are stretched."""


def read_rope(file: Path, entries: dict[str, Any]) -> Rope:
    """The rotary positions, from rope_scaling and rope_theta (transformers 4) or rope_parameters (5).

    A setting that says what follows from the others anyway is accepted: attention_factor, mscale and mscale_all_dim,
    as transformers reads them, and a partial_rotary_factor of 1. Where a file has no settings, or null, they are the
    released models', as transformers has it; `{"rope_type": "default"}` is what asks for positions without YaRN.

    Args:
      file: config.json, for errors.
      entries: what it holds.

    Raises:
      ValueError: the kind of rope or one of its settings is not one that this model has.
    """
    given = spelt(file, entries)
    if not entries.get("rope_parameters") and not entries.get("rope_scaling"):
        given = dataclasses.asdict(Rope()) | given | {"rope_type": "yarn"}
    kind = given.pop("rope_type", given.pop("type", "default"))
    if kind not in ("yarn", "default"):
        raise ValueError(f'{file}: rope_type must be "yarn" or "default", got {in_json(kind)}')
    wanted = {field.name for field in dataclasses.fields(Rope)} if kind == "yarn" else {"rope_theta"}
    accepted = harmless(given, factor=number(given.get("factor"), float) if kind == "yarn" else 1.0)
    if unknown := sorted(set(given) - wanted - accepted):
        raise ValueError(
            f"{file}: rope settings of {kind} are {', '.join(sorted(wanted))}, got also {unknown} "
            f"({', '.join(f'{name} {in_json(given[name])}' for name in unknown)}), which the model would have to be "
            "computed otherwise for"
        )
    # Without the key transformers rounds the corrected dimensions.
    truncate = given.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"{file}: truncate must be true or false, got {in_json(truncate)}")
    numbers = {}
    for name in sorted(wanted - {"truncate"}):
        of = int if name == "original_max_position_embeddings" else float
        value = number(given.get(name), of)
        if value is None:
            raise ValueError(f"{file}: {name} must be a positive {of.__name__}, got {in_json(given.get(name))}")
        least = 1 if name == "rope_theta" else LEAST
        if not least < value < MOST:
            raise ValueError(f"{file}: {name} must be between {least} and {MOST:g}, got {in_json(given[name])}")
        numbers[name] = value
    return Rope(truncate=truncate, **numbers) if kind == "yarn" else Rope(numbers["rope_theta"], factor=1.0)


def spelt(file: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """The settings in transformers 5's spelling, those that are null left out.

    Raises:
      ValueError: they are not an object, or both spellings are there and do not agree.
    """
    spellings: list[Any] = [entries[name] for name in ("rope_parameters", "rope_scaling") if entries.get(name)]
    for given in spellings:
        if not isinstance(given, dict):
            raise ValueError(f"{file}: rope settings must be an object, got {in_json(given)}")
    found: dict[str, Any] = {}
    for given in spellings:
        for name, value in given.items():
            if value is not None and found.setdefault(name, value) != value:
                raise ValueError(f"{file}: {name} of rope must be one, got {in_json(found[name])} and {in_json(value)}")
    for name in ("rope_theta", "partial_rotary_factor"):
        value = entries.get(name)
        if value is not None and found.setdefault(name, value) != value:
            raise ValueError(f"{file}: {name} of rope must be one, got {in_json(found[name])} and {in_json(value)}")
    return found


def harmless(given: dict[str, Any], *, factor: float | None) -> set[str]:
    """Those settings that change nothing: as they follow from the factor, or ask for what this model does."""
    accepted = {"partial_rotary_factor"} if given.get("partial_rotary_factor") == 1 else set()
    stretch = {name: given.get(name) for name in STRETCH if name in given}
    if factor is None or not all(number(value, float) or value == 0 for value in stretch.values()):
        return accepted
    attention, one, all_dim = (number(stretch.get(name), float) for name in STRETCH)
    computed = stretched(factor, 1.0)
    if attention is None and one and all_dim:
        attention = stretched(factor, one) / stretched(factor, all_dim)
    elif attention is None and one:
        attention = one if math.isclose(one, computed, rel_tol=1e-6) else stretched(factor, one)
    same = attention is None or math.isclose(attention, computed, rel_tol=1e-6)
    return accepted | set(stretch) if same else accepted


def stretched(factor: float, coefficient: float) -> float:
    """What multiplies cosine and sine: of YaRN as of DeepSeek, whose models have a coefficient other than 1."""
    return 0.1 * coefficient * math.log(max(factor, 1.0)) + 1
