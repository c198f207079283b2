"""`dougong`: gathers the commands and turns errors into one readable screen.

Nothing here or in a command's module imports torch before the command runs, so `dougong --help` is instant.
"""

import os
import signal
import sys

import typer

from dougong.cli import (
    chat,
    compress,
    data,
    demo,
    evaluate,
    export,
    generate,
    import_model,
    inspect,
    plan,
    recipes,
    report,
    serve,
    show,
    train,
)
from dougong.core.errors import ConfigError, DougongError
from dougong.core.files import explained_disk_errors

WAIT_SPINS = "10000"
"""How long torch's threads spin for each other before they sleep. Spinning for long, the default, costs nothing on an
idle machine and everything on a shared one: who has no core is waited for by who has one (a step of 25 ms took 242 on
average). It is read when torch is loaded, so it is set before any command runs; a value of your own stays."""

LESS_MEMORY = ("What was saved is kept. In training fewer rows at once (train.micro_rows=1), "
               "train.gradient_checkpointing=true, or an adapter (adapt=lora, adapt.base=int4) take less; for writing, "
               "`dougong compress`. `dougong plan` says what fits, `nvidia-smi` what else is on the GPU.")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="斗拱 dougong: build your own large model, from a folder of files to a model that writes.\n\n"
                       "Begin with: dougong demo")
app.command("demo")(demo.demo)
app.command("recipes")(recipes.recipes)
app.command("show")(show.show)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("report")(report.report)
app.command("compress")(compress.compress)
app.command("export")(export.export)
app.command("import")(import_model.import_model)
app.command("inspect")(inspect.inspect)
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from dougong import __version__

        print(f"dougong {__version__}")
        raise typer.Exit
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and context.invoked_subcommand != "train":
        raise ConfigError(f"{processes} processes were launched, and `dougong {context.invoked_subcommand}` is work "
                          "for one. Start it without torchrun; only `dougong train` divides its work.")


def main() -> None:
    """Entry point: user errors go to standard error as one screen, with exit code 2 and no traceback."""
    os.environ.setdefault("GOMP_SPINCOUNT", WAIT_SPINS)
    try:
        with explained_disk_errors("the output"):
            app()
    except DougongError as error:
        rank = os.environ.get("RANK", "0")   # the first process says it whole, the others in a line
        print(f"\nerror: {error}" if rank == "0" else f"process {rank}: {str(error).splitlines()[0]}", file=sys.stderr)
        _leave(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":      # torch's; it is not imported here
            raise
        print(f"\nerror: {str(error).splitlines()[0]}\n{LESS_MEMORY}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        print("\nstopped.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


def _leave(code: int) -> None:
    """Ends the process. One of several leaves at once: others may wait for it in a collective whose threads would abort
    an orderly end."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
