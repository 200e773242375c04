"""From a JSONL file to an adapter that helps, on the tiny checkpoint beside this file: two minutes on two cores.

    python examples/finetune_gpt_oss.py [directory]

The task is to say whether a number is even. The tiny model's weights are random and know nothing of it; LoRA on its
4-bit experts and its attention learns it from 160 questions, and the harness asks 40 others. docs/finetune.md does the
same by commands, as for a real checkpoint.
"""

import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from jmoe import gpt_oss
from jmoe.commands.evaluate import table
from jmoe.evaluate.run import EvaluateOptions, evaluate
from jmoe.finetune.config import FinetuneConfig
from jmoe.finetune.run import finetune
from jmoe.text import chat_text, encode, load_tokenizer

EXAMPLES = Path(__file__).parent
TINY = EXAMPLES / "tiny_gpt_oss"


def main() -> None:
    """Trains, evaluates without and with the adapter, and asks a question."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).absolute()
    os.chdir(EXAMPLES.parent)  # where the task's file says its questions are
    console = Console()
    config = FinetuneConfig(
        model=str(TINY),
        data="examples/even/train.jsonl",
        out=str(out),
        length=128,
        batch_size=8,
        steps=120,
        learning_rate=4e-3,
        validate_every=30,
        dtype="float32",
        remat="nothing",
    )
    adapter = finetune(config, console).adapter

    options = EvaluateOptions(
        model=TINY,
        adapter=adapter,
        tasks=["even"],
        include_path=EXAMPLES / "even",
        apply_chat_template=True,
    )
    base, adapted = evaluate(options)
    console.print(table([base, adapted]))

    tokenizer = load_tokenizer(TINY)
    question = chat_text(tokenizer, [{"role": "user", "content": "Is 5 even?"}], reply=True)
    model = gpt_oss.load(TINY, adapter=adapter, progress=False)
    text = gpt_oss.generate(model, [encode(tokenizer, question)], max_new_tokens=8, stop_tokens=[0, 5])
    console.print(f"Is 5 even? {tokenizer.decode(text.tokens[0, : text.lengths[0]])}")
    if adapted[0].value < 0.9:
        raise SystemExit(f"with the adapter only {adapted[0].value:.0%} of the answers are right")


if __name__ == "__main__":
    main()
