"""From a JSONL file to an adapter that helps, on the tiny checkpoint beside this file: two minutes on two cores.

    python examples/finetune_gpt_oss.py [directory]

The rows are pages of Python's manual. The tiny model's weights are random, so that its text stays nonsense; what counts
is that the adapter makes the manual's words likelier. For a real checkpoint, see docs/finetune.md.
"""

import json
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jmoe import gpt_oss
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.metrics import read
from jmoe.finetune.run import finetune
from jmoe.text import chat_text, encode, load_tokenizer

TINY = Path(__file__).parent / "tiny_gpt_oss"


def write_rows(file: Path) -> None:
    """A conversation for each paragraph of the manual: the topic asked for, and the paragraph in reply."""
    rows = []
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        for paragraph in text.split("\n\n"):
            if 80 <= len(paragraph) <= 300:
                question = {"role": "user", "content": f"What does Python's manual say of {topic}?"}
                rows.append({"messages": [question, {"role": "assistant", "content": paragraph}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:600]))


def main() -> None:
    """Trains, and shows the loss before and after."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    write_rows(out / "manual.jsonl")
    config = FinetuneConfig(
        model=str(TINY),
        data=str(out / "manual.jsonl"),
        out=str(out / "run"),
        length=256,
        batch_size=2,
        rank=8,
        alpha=16.0,
        steps=60,
        learning_rate=1e-2,
        validate_every=15,
        dtype="float32",
        remat="nothing",
    )
    result = finetune(config, console)

    table = Table("step", "nats a token on held-out paragraphs")
    for row in read(out / "run"):
        if "validation_loss" in row:
            table.add_row(str(row["step"]), f"{row['validation_loss']:.3f}")
    console.print(table)

    tokenizer = load_tokenizer(TINY)
    prompt = chat_text(tokenizer, [{"role": "user", "content": "What does Python's manual say of if?"}], reply=True)
    model = gpt_oss.load(TINY, adapter=result.adapter, progress=False)
    prompts = [encode(tokenizer, prompt)] * 2
    text = gpt_oss.generate(model, prompts, max_new_tokens=20, adapter_ids=[-1, 0])
    for name, tokens in zip(("without", "with"), text.tokens, strict=True):
        console.print(f"{name} the adapter: {tokenizer.decode(tokens)!r}", markup=False, highlight=False)
    before, after = (read(out / "run")[place]["validation_loss"] for place in (0, -1))
    if after > before - 1:
        raise SystemExit(f"the loss went from {before:.3f} to {after:.3f} only")


if __name__ == "__main__":
    main()
