"""`dougong compress`: weights of 8 or 4 bits, fewer parts, fewer tokens, and the card that compares what was made."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import typer

from dougong.cli.output import Json, console, emit, tell_passed_over


def compress(
    run: Annotated[Path, typer.Argument(help="A run, one of its checkpoints, or a Hugging Face directory.")],
    to: Annotated[Literal["int8", "int4"] | None, typer.Option("--to", help="Bits of a weight; int8 unless another "
                                                                            "kind is asked for.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="How the integers are found. rtn: round to nearest; "
                                               "gptq and awq look at the run's training text.")] = None,
    group: Annotated[int | None, typer.Option(
        "--group", min=0, help="Columns that share a scale; 0: a whole row. Default: 32, as in GGUF's q8_0 and q4_0; "
                               "0 with int8 activations.")] = None,
    activations: Annotated[Literal["float", "int8"] | None, typer.Option(
        "--activations", help="int8: round what the matrices multiply too, row by row; fast for batches.")] = None,
    prune: Annotated[float | None, typer.Option("--prune", help="Instead: a run without this share of the parameters, "
                                                                "such as 0.3.")] = None,
    trim: Annotated[bool, typer.Option("--trim-vocabulary", help="Instead: a run without the tokens that the training "
                                                                 "text does not need.")] = False,
    least: Annotated[int | None, typer.Option("--least", min=1, help="With --trim-vocabulary: how often a token must "
                                                                     "occur to stay (1).")] = None,
    card: Annotated[bool, typer.Option("--card", help="Instead: a page that compares the run with what was made of "
                                                      "it.")] = False,
    others: Annotated[list[Path] | None, typer.Option("--with", help="With --card: these runs; default: those beside "
                                                                     "it that were made from it.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Text to look at instead of the run's own: a folder, file "
                                                            "or glob.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where; default: beside the run, under its name and "
                                                                 "what was done.")] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="best, last, or a step.")] = "best",
    as_json: Json = False,
) -> None:
    """Make a run smaller; generate, eval, serve and export open it like any other."""
    from dougong.core.errors import ConfigError
    from dougong.recipes.open_run import open_run

    rounding = {"--to": to, "--method": method, "--group": group, "--activations": activations}
    kind = _only("--prune" if prune is not None else "", "--trim-vocabulary" if trim else "", "--card" if card else "",
                 **(rounding if prune is not None or trim or card else {}))
    _belongs("--least", least is not None, "--trim-vocabulary", kind)
    _belongs("--with", bool(others), "--card", kind)
    if data is not None and not kind and (method or "rtn") == "rtn":
        raise ConfigError("--data has no effect here: rtn rounds every weight to the nearest integer and looks at no "
                          "text. Choose --method gptq or awq, which do, or leave it out.")
    opened = open_run(run, checkpoint=checkpoint)
    tell_passed_over(opened)
    text = None if data is None else opened.on_data(data)
    screen = console(as_json)
    if kind == "--card":
        emit(_card(text or opened, others, out, screen), as_json)
    elif kind:
        from dougong.recipes.smaller import prune_run, trim_run

        place = out or opened.beside("pruned" if prune is not None else "trimmed")
        made = prune_run(opened, place, ratio=prune, text=text, say=lambda said: screen.print(said, style="dim")) \
            if prune is not None else trim_run(opened, place, least=least or 1, text=text)
        _tell_smaller(made, screen)
        emit(made.to_dict(), as_json)
    else:
        made = _integers(opened, text, to or "int8", method or "rtn", group, activations or "float", out, screen)
        emit(made, as_json)


def _only(*kinds: str, **rounding: Any) -> str:
    """The one kind that is asked for; "" is integers. Raises ConfigError for several at once."""
    from dougong.core.errors import ConfigError

    asked = [kind for kind in kinds if kind]
    beside = [name for name, value in rounding.items() if value is not None]
    if len(asked) + bool(beside) > 1:
        raise ConfigError(f"{' and '.join([*asked, *beside])} are different things to do. Do one after the other: the "
                          "run that one makes is what the next begins from.")
    return asked[0] if asked else ""


def _belongs(option: str, given: bool, to: str, kind: str) -> None:
    from dougong.core.errors import ConfigError

    if given and kind != to:
        raise ConfigError(f"{option} has no effect without {to}. Leave it out.")


def _integers(opened: Any, text: Any, to: str, method: str, group: int | None, activations: Any, out: Path | None,
              screen: Any) -> dict[str, Any]:
    from dougong.recipes.compress import compress_run, form_for

    form = form_for(to, group=group, activations=activations)
    place = out or opened.beside(to if method == "rtn" else f"{to}-{method}")
    made = compress_run(opened, place, form, method=method, text=text)
    screen.print(f"{made.compression.title()}: {made.bytes_before:,} bytes of weights are {made.bytes_after:,} "
                 f"({made.bytes_before / made.bytes_after:.1f} times smaller)")
    for note in made.notes:
        screen.print(note, markup=False)
    screen.print(f"written: {made.directory.path}", style="bold", markup=False)
    screen.print(f"what it costs: dougong eval {quote(str(made.directory.path))}, or beside others: dougong compress "
                 f"{quote(str(opened.directory.path))} --card", style="dim", markup=False, soft_wrap=True)
    return made.to_dict()


def _tell_smaller(made: Any, screen: Any) -> None:
    facts = made.facts
    screen.print(f"{made.parameters_before:,} parameters are {made.parameters:,} "
                 f"({1 - made.parameters / made.parameters_before:.1%} fewer)")
    if made.how == "pruned":
        screen.print(f"layers {', '.join(map(str, facts['layers']))}; {facts['groups']} key/value heads, "
                     f"{facts['channels']} feed-forward channels in each")
        screen.print(f"loss on calibration text: {facts['loss_before']:.3f} before, {facts['loss']:.3f} now, without "
                     "any training")
    else:
        screen.print(f"{facts['vocabulary_before']:,} tokens are {facts['vocabulary']:,}")
    for note in made.notes:
        screen.print(note, markup=False)
    screen.print(f"written: {made.directory.path}", style="bold", markup=False)
    screen.print(f"train it on: dougong train RECIPE --model {quote(str(made.directory.path))}", style="dim",
                 markup=False, soft_wrap=True)


def _card(opened: Any, others: list[Path] | None, out: Path | None, screen: Any) -> dict[str, Any]:
    from dougong.core.files import write_json
    from dougong.recipes.card import card, variants_of
    from dougong.report.card_page import write_card_page
    from dougong.report.card_words import advice

    found = card(opened, others or variants_of(opened.directory.path),
                 say=lambda text: screen.print(text, style="dim"))
    said = advice(found["variants"])
    found["advice"] = {"en": said.en, "zh": said.zh}
    place = out or (Path() if opened.hub else opened.directory.path) / "compression.html"
    write_json(place.with_suffix(".json"), found)
    write_card_page(found, place)
    for row in found["variants"]:
        screen.print(f"{row['name']:<28}{row['disk_bytes']:>14,} bytes  {row['bits_per_byte']:.4f} bits per byte "
                     f"({100 * row['relative']:+.2f} %)  {row['tokens_per_s']['1']['median']:,.0f} tokens/s")
    screen.print(said.en)
    screen.print(f"written: {place}", style="bold")
    return {**found, "page": str(place)}
