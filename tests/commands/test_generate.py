"""`jmoe generate` on the tiny checkpoint."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from jmoe import gpt_oss
from jmoe.cli import app
from jmoe.gpt_oss.config import stop_tokens
from jmoe.text import encode, load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny_gpt_oss"
SHORT = ["--model", str(TINY), "--max-new-tokens", "10"]


def after(text: str, *, adapter: Path | None = None) -> str:
    """What the model writes after the text."""
    tokenizer = load_tokenizer(TINY)
    model = gpt_oss.load(TINY, adapter=adapter, progress=False)
    stop = stop_tokens(TINY, model.config)
    found = gpt_oss.generate(model, [encode(tokenizer, text)], max_new_tokens=10, stop_tokens=stop)
    return tokenizer.decode(found.tokens[0, : found.lengths[0]].tolist(), skip_special_tokens=True)


def test_a_prompt_is_a_message_in_the_chat_template() -> None:
    run = CliRunner().invoke(app, ["generate", *SHORT, "--system", "Be brief", "Hi"])
    assert run.exit_code == 0, run.output
    messages = "<|start|>system<|message|>Be brief<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>"
    assert run.stdout == after(messages) + "\n"
    tokens = len(encode(load_tokenizer(TINY), messages))
    assert f"prompt: {tokens} tokens, prefill " in run.stderr
    assert "new: 10 tokens, " in run.stderr


def test_several_prompts_have_each_its_adapter() -> None:
    adapter = ["--adapter", str(TINY / "adapter")]
    run = CliRunner().invoke(app, ["generate", *SHORT, *adapter, *adapter, "--raw", "The License", "The License"])
    assert run.exit_code == 0, run.output
    want = after("The License", adapter=TINY / "adapter")
    assert run.stdout == f"[0] {want}\n[1] {want}\n"
    assert want != after("The License")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--raw", "--system", "x", "Hi"], "--system needs the chat template"),
        (["--adapter", "a", "--adapter", "b", "Hi"], "several --adapter need"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str) -> None:
    run = CliRunner().invoke(app, ["generate", *SHORT, *options])
    assert run.exit_code == 2
    assert message in run.stderr


def test_samples_differ_by_seed() -> None:
    run = lambda seed: CliRunner().invoke(  # noqa: E731
        app, ["generate", *SHORT, "--temperature", "1", "--seed", str(seed), "Hi"]
    )
    first, second = run(1), run(2)
    assert first.exit_code == second.exit_code == 0
    assert first.stdout != second.stdout
