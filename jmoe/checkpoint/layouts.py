"""Where a model's tensors lie in the files of each layout that gpt-oss checkpoints have.

Everything else sees one view of a checkpoint: tensors by Hugging Face's names, experts either packed
(`mlp.experts.*_proj_blocks` and `*_proj_scales`) or dense (`mlp.experts.*_proj`, [E, in, out]), dense ones in bfloat16.
"""

import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from jmoe.checkpoint.tensors import READ_AS, Spec

EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj")
"""Dense experts in the view."""

LAYER = re.compile(r"\b(layers|block)\.(\d+)\.")
"""Where a name says which layer it is of."""

EXPERT = re.compile(r"\.experts\.(?:\w+s\.)?(\d+)\.")
"""Where a name says which expert it is of, in files that have each apart."""


class Part(NamedTuple):
    """Where a tensor of the view lies in the files.

    rows: (first, end, of how many) of the file's tensor are it; None: all.
    swapped: the file has the last two axes the other way round.
    """

    name: str
    rows: tuple[int, int, int] | None = None
    swapped: bool = False

    def view(self, stored: Spec) -> Spec:
        """The header in the view of what the file has; that of the file if it cannot hold the part."""
        spec = Spec(READ_AS.get(stored.dtype, stored.dtype), stored.shape)
        if self.rows is not None and stored.shape[:1] == self.rows[2:]:
            spec = spec._replace(shape=(self.rows[1] - self.rows[0], *stored.shape[1:]))
        return spec.swapped if self.swapped else spec

    def stored(self, spec: Spec) -> Spec:
        """The header that the file must have for this one in the view."""
        spec = spec.swapped if self.swapped else spec
        return spec if self.rows is None else spec._replace(shape=(self.rows[2], *spec.shape[1:]))


class Layout(NamedTuple):
    """How files name and cut what the view has.

    locate: finds the part that a tensor of the view is, whether or not there is one.
    input_first: dense experts are [E, in, out], as a rule.
    """

    locate: Callable[[str], Part]
    input_first: bool


class HeadSizes(NamedTuple):
    """Rows of q and of k, which v has too."""

    queries: int
    keys: int


def layout_of(names: Collection[str], head_sizes: Callable[[], HeadSizes]) -> Layout:
    """The layout that tensors of these names are in."""
    if any(name.startswith("block.") for name in names):
        return original(head_sizes())
    return huggingface(names)


def huggingface(names: Iterable[str]) -> Layout:
    """transformers' own; the prefix `model.` may be missing, and the router may be wrapped as `router.linear`."""
    names = list(names)
    bare = any(name.startswith("layers.") for name in names)
    wrapped = any(".mlp.router.linear." in name for name in names)

    def locate(name: str) -> Part:
        if bare:
            name = name.removeprefix("model.")
        return Part(name.replace(".mlp.router.", ".mlp.router.linear.") if wrapped else name)

    return Layout(locate, input_first=True)


ORIGINAL = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
}
ORIGINAL_LAYER = {
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    **{
        f"mlp.experts.{projection}_proj{ours}": f"mlp.{theirs}{ending}"
        for projection, theirs in (("gate_up", "mlp1"), ("down", "mlp2"))
        for ours, ending in (
            ("_blocks", "_weight.blocks"),
            ("_scales", "_weight.scales"),
            ("_bias", "_bias"),
            ("", "_weight"),
        )
    },
}
"""Names of the view, and those of OpenAI's files, where q, k and v are one tensor."""


def original(heads: HeadSizes) -> Layout:
    """The files of OpenAI's folder `original/`: gpt_oss/torch/model.py of github.com/openai/gpt-oss."""
    queries, keys = heads
    ends = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, queries + 2 * keys)}

    def locate(name: str) -> Part:
        if name in ORIGINAL:
            return Part(ORIGINAL[name])
        if not (found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)):
            return Part(name)
        layer, rest = found.groups()
        if attention := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest):
            return Part(f"block.{layer}.attn.qkv.{attention[2]}", (*ends[attention[1]], queries + 2 * keys))
        return Part(f"block.{layer}.{ORIGINAL_LAYER.get(rest, rest)}")

    return Layout(locate, input_first=False)


def input_first(layout: Layout, shapes: dict[str, Spec], hidden: int, inner: int) -> tuple[bool, str | None]:
    """(whether a layer's dense experts are [E, in, out], which projection tells so).

    A square matrix tells nothing. One of gate_up [2 inner, hidden] and down [hidden, inner] is not square, and both are
    taken to lie the same way.

    Args:
      shapes: headers of gate_up and down as they lie in the files, of those that are dense.
    """
    sizes = {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    for projection, (out, width) in sizes.items():
        if projection in shapes and out != width:
            axes = shapes[projection].shape[-2:]
            if axes in ((out, width), (width, out)):
                return axes == (width, out), projection
    return layout.input_first, None


def grouped(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of (tensor, what of it), those alike of several layers or experts in one: layers.{0..3,7}.norm: ..."""
    for pattern in (LAYER, EXPERT):
        lines = alike(lines, pattern)
    return [f"{name}: {said}" for name, said in lines]


def alike(lines: Iterable[tuple[str, str]], pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    """The lines, those in one that differ in nothing but the number that is the pattern's last group."""
    numbers: dict[tuple[str, str, str], list[int]] = {}
    for name, said in lines:
        found = pattern.search(name)
        if found is None:
            numbers[name, "", said] = []
            continue
        first, end = found.span(found.re.groups)
        numbers.setdefault((name[:first], name[end:], said), []).append(int(name[first:end]))
    return [
        (f"{before}{of[0] if len(of) == 1 else ranges(of) if of else ''}{after}", said)
        for (before, after, said), of in numbers.items()
    ]


def ranges(numbers: Iterable[int]) -> str:
    """{0..3,7} of 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return "{" + ",".join("..".join(map(str, run)) for run in runs) + "}"


FOREIGN = {
    r"\.experts\.(gate_up_projs|down_projs)?\.?\d+\.": "experts are stored one by one, which is not read: "
    "save the model with transformers, which stacks them",
    r"\.(quant_state|absmax|nested_absmax)": "tensors are those of bitsandbytes, which are not read: save the model "
    "dequantised",
    r"\.(weight_packed|weight_scale|qweight|qzeros|input_scale)(_inv)?$": "tensors are of another format than MXFP4, "
    "which is not read: save the model dequantised",
    r"lora_[AB]\.": "tensors are an adapter's: give the model that it was trained on, and the adapter beside it",
}
"""What tensors are called in files that are not read, and what to say of them."""


def why_not(names: Iterable[str]) -> list[str]:
    """What may explain that tensors of these names are not those of a model, a line each."""
    names = list(names)
    said = [f"  its {text}" for pattern, text in FOREIGN.items() if any(re.search(pattern, name) for name in names)]
    if any(name.endswith("embed_tokens.weight") for name in names) and "lm_head.weight" not in names:
        said.append("  it has no lm_head.weight: gpt-oss has a head of its own, which is not tied to the embedding")
    return said
