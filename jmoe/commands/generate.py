"""`jmoe generate`: text that follows prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jmoe.commands.adapter_options import LoraBLayoutOption
from jmoe.device_memory import allow_whole_gpu

if TYPE_CHECKING:
    from jmoe.gpt_oss.generate import Generated

CHUNK = 8
"""Steps between two pieces of streamed text."""


def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more texts; each starts a sequence of its own.")],
    model: Annotated[str, typer.Option(help="A gpt-oss directory, or a repository on the Hub.")],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="A PEFT adapter directory. One is for all prompts; of several, prompt i has the i-th."),
    ] = None,
    lora_b_layout: LoraBLayoutOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message before each prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens of each sequence at most.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the fewest tokens that have this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the samples.", min=0, max=2**32 - 1)] = 0,
    show_special: Annotated[bool, typer.Option("--show-special", help="Print special tokens too.")] = False,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Tokens of each prompt at once, which bounds memory; all if none.", min=1)
    ] = None,
) -> None:
    """Prints what a model writes after each prompt, which by default is a user's message in its chat template.

    One prompt's text is printed as it comes, several prompts' one after another when all are done. The last line, on
    stderr, says how fast it was.
    """
    if raw and system is not None:
        raise typer.BadParameter("--system needs the chat template, which --raw leaves out")
    adapters = adapter or []
    if len(adapters) > 1 and len(adapters) != len(prompts):
        raise typer.BadParameter(
            f"several --adapter need as many prompts, one for each: got {len(adapters)} and {len(prompts)}"
        )
    allow_whole_gpu()
    from jmoe import gpt_oss
    from jmoe.gpt_oss.config import stop_tokens
    from jmoe.gpt_oss.load import local_directory
    from jmoe.gpt_oss.stream import TextStream
    from jmoe.text import encode, load_tokenizer

    directory = local_directory(model)
    tokenizer = load_tokenizer(directory)
    tokens = [encode(tokenizer, prompt if raw else as_message(tokenizer, prompt, system)) for prompt in prompts]
    loaded = gpt_oss.load(directory, adapter=adapters, lora_b_layout=lora_b_layout)
    stream = TextStream(tokenizer, show_special=show_special)

    def print_first(new: Any, is_text: Any) -> None:
        typer.echo(stream.push(new[0][is_text[0]].tolist()), nl=False)

    generated = gpt_oss.generate(
        loaded,
        tokens,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens(directory, loaded.config),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        adapter_ids=range(len(adapters)) if len(adapters) > 1 else None,
        callback=print_first if len(prompts) == 1 else None,
        chunk=CHUNK,
        prefill_chunk=prefill_chunk,
    )
    if len(prompts) == 1:
        typer.echo(stream.finish())
    else:
        for i, (row, length) in enumerate(zip(generated.tokens, generated.lengths, strict=True)):
            text = tokenizer.decode(row[:length].tolist(), skip_special_tokens=not show_special)
            typer.echo(f"[{i}] {text}")
    typer.echo(speed(generated, sum(map(len, tokens))), err=True)


def as_message(tokenizer: Any, prompt: str, system: str | None) -> str:
    """The prompt as a user's message, up to where the reply begins."""
    from jmoe.text import chat_text

    before = [] if system is None else [{"role": "system", "content": system}]
    return chat_text(tokenizer, [*before, {"role": "user", "content": prompt}], reply=True)


def speed(generated: "Generated", prompt_tokens: int) -> str:
    """The line that says how fast it was."""
    seconds = generated.seconds
    new = int(generated.lengths.sum())
    rate = seconds.step_rate
    if rate is None:
        spent = f"{seconds.steps:.2f} s, compilation included"
    else:
        spent = f"{rate * len(generated.lengths):.1f} tokens/s once compiled"
    return (
        f"prompt: {prompt_tokens} tokens, prefill {seconds.prefill:.2f} s, compilation included; "
        f"new: {new} tokens, {spent}"
    )
