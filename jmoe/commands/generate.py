"""`jmoe generate`: text that follows prompts."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jmoe.commands.model_options import LoraBLayoutOption, MeshOption, QuantizeOption, ReasoningEffortOption
from jmoe.commands.paths import input_path, output_path
from jmoe.device_memory import allow_whole_gpu

if TYPE_CHECKING:
    from jmoe.generation.prompts import Prompt
    from jmoe.gpt_oss.generate import Generated

FILE_BATCH = 8
"""Replies generated at once for the prompts of a file; those of a command line are one batch."""


def generate(
    model: Annotated[str, typer.Option(help="A gpt-oss directory, or a repository on the Hub.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts, each the beginning of a sequence of its own; - is standard input, which is read too if it is "
            "no terminal and no prompt is given.",
            show_default=False,
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            parser=input_path,
            help='Prompts of a file: rows {"prompt": ...} or {"messages": [...]} if named .jsonl, .csv or .parquet, '
            "else one a line.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", parser=output_path, help="Write a row of JSON a reply to this new file, batch by batch."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a row of JSON a reply.")] = False,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="<path>",
            parser=input_path,
            help="A PEFT adapter directory. One is for all prompts; of several, prompt i has the i-th.",
        ),
    ] = None,
    lora_b_layout: LoraBLayoutOption = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="Continue the text as it is, without the chat template, and print all tokens. Control tokens may be "
            "written out in it.",
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(help="A system message before each prompt.")] = None,
    developer: Annotated[str | None, typer.Option(help="A developer's message before each prompt.")] = None,
    reasoning_effort: ReasoningEffortOption = None,
    tools: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=input_path, help="A JSON list of the functions that the model may call."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens of each reply at most.", min=1)] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End a reply before this string in its final channel; may be given again."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the fewest tokens that have this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many of the likeliest tokens; 0 from all.", min=0)] = 0,
    min_p: Annotated[
        float, typer.Option(help="Sample from tokens at least so many times as likely as the likeliest.", min=0, max=1)
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that prompt or reply have already become less likely.")
    ] = 1.0,
    samples: Annotated[int, typer.Option(help="Replies to each prompt.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the samples.", min=0, max=2**32 - 1)] = 0,
    quantize: QuantizeOption = None,
    mesh: MeshOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help=f"Replies generated at once; by default {FILE_BATCH} of a file, all of a command line.", min=1
        ),
    ] = None,
    show_special: Annotated[
        bool, typer.Option("--show-special", help="Print all tokens, special ones too, as --raw does.")
    ] = False,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Tokens of each prompt at once, which bounds memory; all if not given.", min=1)
    ] = None,
) -> None:
    """Prints what a model writes after each prompt, which by default is a user's message in its chat template.

    The final channel goes to standard output; what the model thinks goes to standard error, dimmed on a terminal. One
    reply is printed as it comes, several one after another. The last line, on standard error, says how fast it was.
    """
    template = {"--system": system, "--developer": developer, "--reasoning-effort": reasoning_effort, "--tools": tools}
    if raw and (given := [flag for flag, value in template.items() if value is not None]):
        raise typer.BadParameter(f"{given[0]} needs the chat template, which --raw leaves out")
    if temperature == 0 and samples > 1:
        raise typer.BadParameter("--samples above 1 needs --temperature above 0: without it all are the same")
    from jmoe.generation.output import REPLY_KEYS, RowFile
    from jmoe.generation.prompts import Frame, tokens_of, tools_of_file

    rows = None if out is None else RowFile(out)
    asked = read_prompts(prompts, prompts_file, REPLY_KEYS if as_json or out is not None else ())
    adapters = adapter or []
    if len(adapters) > 1 and len(adapters) != len(asked):
        raise typer.BadParameter(
            f"several --adapter need as many prompts, one for each: got {len(adapters)} and {len(asked)}"
        )
    frame = Frame(
        raw=raw,
        system=system,
        developer=developer,
        reasoning_effort=reasoning_effort,
        tools=() if tools is None else tools_of_file(tools),
    )
    allow_whole_gpu()
    from jmoe import gpt_oss
    from jmoe.generation.batches import Generation, Request, answers
    from jmoe.generation.output import Printer, as_row, echo, json_line
    from jmoe.gpt_oss.layout import mesh_and_layout
    from jmoe.gpt_oss.load import local_directory
    from jmoe.gpt_oss.sample import Sampling
    from jmoe.text import load_tokenizer

    Sampling.create(temperature, top_p, top_k, min_p, repetition_penalty)  # an error now, not once weights are loaded

    directory = local_directory(model)
    devices, layout = mesh_and_layout(mesh, gpt_oss.Config.load(directory))
    tokenizer = load_tokenizer(directory)
    requests = [
        Request(i, sample, tokens, i if len(adapters) > 1 else None)
        for i, tokens in enumerate([tokens_of(tokenizer, prompt, frame) for prompt in asked])
        for sample in range(samples)
    ]
    how = Generation(
        max_new_tokens=max_new_tokens,
        batch_size=batch_size or (len(requests) if prompts_file is None else FILE_BATCH),
        stop_strings=stop or [],
        whole=raw or show_special,
        seed=seed,
        own_seeds=samples > 1 or prompts_file is not None or batch_size is not None,
        prefill_chunk=prefill_chunk,
        sampling={
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        },
    )
    loaded = gpt_oss.load(
        directory, mesh=devices, layout=layout, adapter=adapters, lora_b_layout=lora_b_layout, quantize=quantize
    )
    printer = Printer()
    done = 0
    streams = len(requests) == 1 and rows is None and not as_json
    with contextlib.closing(rows) if rows is not None else contextlib.nullcontext():
        for found, generated in answers(loaded, tokenizer, requests, how, on_text=printer.push if streams else None):
            if rows is not None:
                rows.write([as_row(asked[each.request.prompt], each) for each in found])
            for each in found if rows is None else []:
                if as_json:
                    echo(json_line(as_row(asked[each.request.prompt], each), sys.stdout.encoding))
                    continue
                if not streams:
                    printer.begin(f"[{label(each.request.prompt, each.request.sample, len(asked), samples)}] ")
                    printer.push(each.reply.messages)
                printer.finish(each)
            done += len(found)
            progress = f"{done} of {len(requests)}: " if len(found) < len(requests) else ""
            echo(progress + speed(generated, sum(len(each.request.tokens) for each in found), len(found)), err=True)


def read_prompts(texts: list[str] | None, file: Path | None, reserved: tuple[str, ...]) -> "list[Prompt]":
    """The prompts of the command line, of a file, or of standard input."""
    from jmoe.generation.prompts import STANDARD_INPUT, from_arguments, from_file

    standard_input = typer.get_binary_stream("stdin")
    if file is not None:
        if texts:
            raise typer.BadParameter("prompts come from the command line or from --prompts, got both")
        return from_file(file, reserved=reserved)
    if not texts and standard_input.isatty():
        raise typer.BadParameter("give a prompt as argument, on standard input or by --prompts")
    return from_arguments(texts or [STANDARD_INPUT], standard_input)


def label(prompt: int, sample: int, prompts: int, samples: int) -> str:
    """The reply's number: of its prompt, of its sample, or of both where there are several of both."""
    if samples == 1:
        return str(prompt)
    return str(sample) if prompts == 1 else f"{prompt}.{sample}"


def speed(generated: "Generated", prompt_tokens: int, replies: int) -> str:
    """The line that says how fast it was."""
    seconds = generated.seconds
    new = int(generated.lengths[:replies].sum())
    rate = seconds.step_rate
    if rate is None:
        spent = f"{seconds.steps:.2f} s, compilation included"
    else:
        spent = f"{rate * replies:.1f} tokens/s once compiled"
    return (
        f"prompt: {prompt_tokens} tokens, prefill {seconds.prefill:.2f} s, compilation included; "
        f"new: {new} tokens, {spent}"
    )
