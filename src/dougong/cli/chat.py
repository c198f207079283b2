"""`dougong chat`: talk to a run in the terminal."""

import contextlib
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer


def chat(
    run: Annotated[Path, typer.Argument(help="A run or one of its checkpoints.")],
    system: Annotated[str, typer.Option(help="A system prompt.")] = "",
    mode: Annotated[str | None, typer.Option(help="chat, or continue (a text); else what the model was trained for.")
                    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    tokens: Annotated[int, typer.Option("--tokens", "-t", min=1, help="New tokens of one answer at most.")] = 400,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed answers the same.")] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="best, last, or a step.")] = "best",
) -> None:
    """Talk to a run's model; /help lists what else can be said."""
    from dougong.cli.output import tell_passed_over
    from dougong.core.errors import ConfigError
    from dougong.generate import Engine
    from dougong.recipes.open_run import open_run
    from dougong.serve.terminal import Conversation

    if mode not in (None, "chat", "continue"):
        raise ConfigError(f"--mode takes chat or continue, not {mode!r}.")
    opened = open_run(run, checkpoint=checkpoint, to_read=True)
    tell_passed_over(opened)
    if opened.tokenizer is None:
        raise ConfigError(f"{opened.directory.path} holds no language model (model.kind={opened.recipe.model.kind}), "
                          "so there is nobody to talk to.")
    sampling: dict[str, Any] = {"temperature": temperature, "max_tokens": tokens}
    sampling |= {"top_p": 0.95} if temperature else {}
    sampling |= {} if seed is None else {"seed": seed}
    conversation = Conversation(Engine(opened.model, opened.runtime), opened.tokenizer, sampling, mode or "", system)
    if system and conversation.mode == "continue":
        raise ConfigError("a text that is continued has no system prompt. Add --mode chat.")
    base = "" if conversation.template.own else ", a base model"
    _tell(f"{opened.directory.path.name}, step {opened.step}{base}; {conversation.mode}. /help, Ctrl-D ends.\n")
    _talk(conversation)


def _talk(conversation: Any) -> None:
    from dougong.core.errors import DougongError

    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for `input`)
    while True:
        try:
            line = input("> " if interactive else "")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input("  " if interactive else "")
        except EOFError:
            return _tell("\n" if interactive else "")
        except KeyboardInterrupt:
            _tell("\n(Ctrl-D ends)\n")
            continue
        if line.strip() in ("/quit", "/exit"):
            return
        if not line.strip() and conversation.mode == "chat":
            continue
        try:
            if line.strip() == "/retry":
                said = conversation.take_back()
                if said is None:
                    _tell("there is nothing to write again.\n")
                else:
                    _answer(conversation, said)
            elif line.startswith("/"):
                _tell(conversation.command(line.strip()) + "\n")
            else:
                _answer(conversation, line)
        except DougongError as error:
            _tell(f"error: {error}\n")


def _answer(conversation: Any, said: str) -> None:
    """Streams the answer to standard output; Ctrl-C stops it between two steps, so that the engine stays whole."""
    asked_to_stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: asked_to_stop.set())
    try:
        with contextlib.closing(conversation.answer(said)) as pieces:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
                if asked_to_stop.is_set():
                    _tell("\n(stopped)")
                    break
    finally:
        signal.signal(signal.SIGINT, before)
    sys.stdout.write("\n")
    sys.stdout.flush()
    speed = conversation.written / conversation.seconds if conversation.seconds else 0.0
    if sys.stderr.isatty():
        _tell(f"({conversation.written} tokens, {speed:.0f} tokens/s, seed {conversation.seed})\n")


def _tell(text: str) -> None:
    """What is not the model's goes to standard error, so that its words can be piped."""
    sys.stderr.write(text)
    sys.stderr.flush()
