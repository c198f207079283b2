"""`dougong generate`: let a run's model continue a text."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dougong.cli.output import Json, emit, tell_passed_over


def generate(
    run: Annotated[Path, typer.Argument(help="A run or one of its checkpoints.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue; `-` reads standard input.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-t", min=1, help="New tokens at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Only the likeliest of this mass; 0.95.")] = None,
    min_p: Annotated[float | None, typer.Option(min=0, max=1, help="Only those this likely beside the best.")] = None,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1 discourages repetition.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Continuations of each prompt.")] = 1,
    logprobs: Annotated[int | None, typer.Option(min=0, help="Also give the n likeliest tokens of each step.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Of a prompt longer than the context, keep its end.")
                        ] = False,
    draft: Annotated[Path | None, typer.Option(help="A smaller run with the same tokenizer, which guesses ahead.")
                     ] = None,
    speculate: Annotated[int | None, typer.Option(min=0, help="Tokens guessed ahead; 4 with --draft, else 0.")] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="best, last, or a step.")] = "best",
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Lay this over the model: a run that trained an "
                                                                   "adapter of it, or PEFT's directory.")] = None,
    as_json: Json = False,
) -> None:
    """Continue one or more texts; one prompt streams as it is written."""
    from dougong.core.config import from_dict
    from dougong.generate import SamplingConfig
    from dougong.recipes.open_run import open_run

    if adapter is not None:
        from dougong.recipes.adapters import open_with_adapter

        opened = open_with_adapter(str(run), adapter, checkpoint=checkpoint)
    else:
        opened = open_run(run, checkpoint=checkpoint, to_read=True)
    tell_passed_over(opened)
    asked = prompts or opened.recipe.sample.prompts or [""]
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in asked]
    if top_p is None and temperature:
        top_p = 0.95
    sampling = from_dict(SamplingConfig, {
        "max_tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "stop": tuple(stop or ()), "seed": seed, "n": samples,
        "logprobs": logprobs, "long_prompt": "truncate" if truncate else "error"})
    out = sys.stderr if as_json else sys.stdout
    streaming = len(texts) == 1 and samples == 1

    unwritten = texts[:1] if streaming else []    # the prompt waits for the first piece: what is refused prints nothing

    def show(_row: int, piece: str) -> None:
        out.write("".join(unwritten) + piece)
        unwritten.clear()
        out.flush()

    results = opened.generate(texts, sampling, stream=show if streaming else None,
                              draft=None if draft is None else open_run(draft, to_read=True), speculate=speculate)
    for result in results:
        if not streaming:
            out.write(f"\n{'─' * 72}\n{result.prompt}{result.text}\n")
    if streaming:
        out.write("".join(unwritten) + "\n")
    emit({"generations": [{**asdict(result), "tokens_per_s": result.tokens_per_s} for result in results]}, as_json)
