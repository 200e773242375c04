"""What a run says before it begins."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from rich.console import Console

from jmoe.conversations.rows import Conversation, Text
from jmoe.finetune.batches import Batches
from jmoe.finetune.config import LARGEST, FinetuneConfig
from jmoe.finetune.examples import Example, make_example, read_examples
from jmoe.finetune.memory import GIB, MemoryEstimate
from jmoe.finetune.packing import pack
from jmoe.finetune.start_report import count_steps, course, devices, lengths, marked, printable, say_rows, say_start
from jmoe.gpt_oss.config import Config
from jmoe.gpt_oss.layout import Layout
from jmoe.text import load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
CONFIG = FinetuneConfig(model="m", data="d", out="o", length=8, batch_size=2)


def example(tokens: int, trained: int) -> Example:
    return Example(np.arange(tokens, dtype=np.int32), np.arange(tokens) >= tokens - trained)


def question() -> Example:
    messages = ({"role": "user", "content": "Is 5 even?"}, {"role": "assistant", "content": "no"})
    return make_example(Conversation(messages), load_tokenizer(TINY))


def test_what_is_trained_stands_in_brackets_with_its_control_tokens() -> None:
    text = marked(load_tokenizer(TINY), question(), colours=False)
    wanted = "<|start|>user<|message|>Is 5 even?<|end|><|start|>assistant<|message|>[[no<|return|>]]"
    assert (text.plain, text.spans) == (wanted, [])


def test_on_a_terminal_colours_say_what_is_trained_and_what_is_control() -> None:
    text = marked(load_tokenizer(TINY), question(), colours=True)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["no"] == "bold green"
    assert styles["<|return|>"] == "cyan bold green"
    assert styles["<|start|>"] == "cyan"
    assert "Is 5 even?" not in "".join(styles)


def test_a_text_is_trained_but_for_its_first_token() -> None:
    tokenizer = load_tokenizer(TINY)
    shown = marked(tokenizer, make_example(Text("words of people"), tokenizer), colours=False).plain
    first, rest = shown.split("[[")
    assert (first + rest).startswith("words of people<|")
    assert shown.endswith("]]")


def test_what_would_move_a_terminals_cursor_is_written_out() -> None:
    assert printable("a\x1b[2J\rb\tc\nä\u202e\x07") == "a\\x1b[2J\\rb\tc\nä\\u202e\\x07"


@pytest.mark.parametrize(("whole", "named"), [(False, 3), (True, 20)])
def test_the_first_bad_rows_are_named_with_what_is_wrong(whole: bool, named: int, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n' + '{"text": 3}\n' * 24)
    found = read_examples(file, load_tokenizer(TINY), max_length=8, bad_rows="skip")
    console = Console(file=io.StringIO())
    say_rows(console, [str(file)], found, whole=whole)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("text must be a string that is not empty, got 3") == named
    assert f"  skipped: {file}, line 2: text must be" in said
    assert f"  skipped: {24 - named} more bad rows\n" in said


def test_lengths_are_percentiles_of_the_rows() -> None:
    said = lengths([example(n, 2) for n in range(3, 103)])
    assert "100 rows, 5,250 tokens of which 200 (4%) are trained" in said
    assert "least 3, half 53, 90 % 93, 99 % 102, longest 102" in said


def test_an_epoch_and_the_steps_are_counted() -> None:
    batches = Batches(pack([example(7, 3), example(5, 2), example(9, 1)], 8), 2, seed=0)
    said = course(CONFIG, batches, 6)
    assert "an epoch: 3 sequences of 8 tokens, 24 tokens of which 6 are trained" in said
    assert "6 steps of 16 tokens, 4.00 epochs" in said


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 2), (0.1, 1), (3.0, 6), (2.6, 6)])
def test_epochs_come_to_steps(epochs: float, steps: int) -> None:
    batches = Batches(pack([example(9, 1)] * 3, 8), 2, seed=0)
    assert count_steps(dataclasses.replace(CONFIG, epochs=epochs), batches, LARGEST) == steps
    with pytest.raises(ValueError, match="epochs must come to at most 2147483647 steps"):
        count_steps(dataclasses.replace(CONFIG, epochs=1e308), batches, LARGEST)


@pytest.mark.parametrize("whole", [False, True])
def test_every_start_says_shortly_what_a_dry_run_says(whole: bool) -> None:
    tokenizer = load_tokenizer(TINY)
    examples = [make_example(Text("x" * 2000), tokenizer)]
    config = dataclasses.replace(CONFIG, length=4096)
    batches = Batches(pack(examples, 4096), 2, seed=0)
    console = Console(file=io.StringIO(), width=80)
    memory = MemoryEstimate({"weights": 12 * GIB, "programs": GIB})
    say_start(console, config, tokenizer, examples, batches, 5, memory, 10 * GIB, whole=whole)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("x" * 1990 in printed) == whole
    assert ("weights 12.0 GiB" in printed) == whole
    assert "about 13.0 GiB" in printed
    assert "of 10.0 GiB that JAX may take" in printed
    assert "warning: a step is likely to take more memory than JAX may take of the device, 13.0 of 10.0 GiB" in printed


@pytest.mark.parametrize(
    ("sizes", "fsdp", "said"),
    [
        ({"data": 2}, False, "mesh data=2: 2 devices; each computes 4 of 8 sequences at once and holds 8 of 8 experts"),
        (
            {"data": 2, "expert": 2},
            True,
            "mesh data=2,expert=2: 4 devices; each computes 2 of 8 sequences at once and holds 2 of 8 experts (fsdp: 4 "
            "of a layer while it is computed), 8 of 8 heads",
        ),
        ({"model": 2}, False, "each computes 8 of 8 sequences at once and holds 4 of 8 experts, 4 of 8 heads"),
    ],
)
def test_a_mesh_is_said_with_what_each_device_has(sizes: dict[str, int], fsdp: bool, said: str) -> None:
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    model = Config.load(TINY)
    assert said in devices(mesh, Layout.of(mesh, model, fsdp=fsdp), model, 8)
