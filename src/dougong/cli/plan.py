"""`dougong plan`: memory, time, cost and layout of a recipe on a machine, or a recipe for a budget."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dougong.cli.output import Json, ModelToBegin, Overrides, console, emit, progress_bar, with_model


def plan(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe's name or a .yaml file.")] = None,
    overrides: Overrides = None,
    model: ModelToBegin = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="How many; else this machine.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Which: h200, h100, a100-80, b200, l4, rtx4090 …")] = None,
    hosts: Annotated[int | None, typer.Option("--hosts", min=1, help="Hosts they stand in; else by kind.")] = None,
    machine: Annotated[Path | None, typer.Option("--machine", help="A .yaml that describes a machine.")] = None,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Of one device for an hour.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Draw the plan on a page.")] = None,
    simulate: Annotated[bool | None, typer.Option("--simulate/--no-simulate",
                                                  help="Run the divided model on fake tensors.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help='The other way round: "8 h200 x 3 days".')] = None,
    data: Annotated[str | None, typer.Option("--data", help="With --budget: how much text, 40GB, or a path.")] = None,
    memory_for_serving: Annotated[str | None, typer.Option("--memory-for-serving",
                                                           help="With --budget: what must hold the model.")] = None,
    probe: Annotated[bool | None, typer.Option("--probe/--no-probe",
                                               help="Measure here: real steps; with --budget, small runs.")] = None,
    as_json: Json = False,
) -> None:
    """Plan a run before its first step: memory, time, cost, layout. With --budget: which model to train."""
    from dougong.core.errors import ConfigError

    out, progress = console(as_json), progress_bar()
    if budget is not None:
        if model is not None:
            raise ConfigError(f"--model {model} is a model, and --budget chooses one. Leave one of them out.")
        _refuse_beside_budget(budget, gpus=gpus, gpu=gpu, hosts=hosts, machine=machine, price=price, simulate=simulate)
        from dougong.recipes.choose import plan_budget

        chosen = plan_budget(budget=budget, data=data, memory_for_serving=memory_for_serving, probe=bool(probe),
                             recipe=recipe, overrides=overrides or [], out=out, progress=progress)
        if html is not None:
            from dougong.report.budget_page import write_budget_page

            out.print(f"\n{write_budget_page(chosen, html)}", markup=False)
        emit(chosen, as_json)
        return
    from dougong.recipes.plan_recipe import plan_recipe
    from dougong.recipes.recipe import load_recipe
    from dougong.recipes.show_plan import print_plan

    _check(recipe, data=data, memory_for_serving=memory_for_serving)
    where, devices = _machine(gpus, gpu, hosts, machine, price)
    asked, _ = load_recipe(str(recipe), with_model(model, overrides))
    found = plan_recipe(asked, where, devices, probe=probe is not False, simulate=simulate is not False,
                        progress=progress)
    print_plan(found, out)
    if html is not None:
        from dougong.report.plan_page import write_plan_page

        page = write_plan_page(found, html)
        out.print(f"\n{page}  ({page.stat().st_size / 1024:,.0f} KiB)", markup=False)
    emit(found, as_json)


def _check(recipe: str | None, **beside_budget: str | None) -> None:
    from dougong.core.errors import ConfigError

    if recipe is None:
        raise ConfigError("name a recipe, as in `dougong plan first`, or say what you have: "
                          '`dougong plan --budget "8 h200 x 3 days"`.')
    for name, value in beside_budget.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} belongs to --budget, which chooses the model. Give both.")


def _refuse_beside_budget(budget: str, **others: Any) -> None:
    from dougong.core.errors import ConfigError

    for name, value in others.items():
        if value is not None:
            raise ConfigError(f"--{name} has no effect beside --budget {budget!r}, which names the machine itself. "
                              "Leave it out.")


def _machine(gpus: int | None, gpu: str | None, hosts: int | None, file: Path | None,
             price: float | None) -> tuple[Any, int]:
    """The machine and how many of its devices. Raises ConfigError for what does not go together."""
    from dougong.core.config import replace
    from dougong.core.errors import ConfigError
    from dougong.plan.machine import load_machine, machine

    if file is not None and gpu is not None:
        raise ConfigError(f"--machine {file} and --gpu {gpu} both say which machine. Give one.")
    if gpus is not None and gpu is None and file is None:
        raise ConfigError(f"--gpus {gpus} of which kind? Add --gpu h200 (or h100, a100-80, b200, l4, rtx4090 …).")
    where = load_machine(file) if file is not None else machine(gpu or "here")
    devices = gpus or (where.host_devices * hosts if hosts else 1)
    if hosts is not None:
        if devices % hosts:
            raise ConfigError(f"{devices} devices do not stand in {hosts} hosts equally. Leave --hosts out: "
                              f"{where.name} usually stands {where.host_devices} in a host.")
        where = replace(where, host_devices=devices // hosts)
    return (where if price is None else replace(where, price_per_hour=price)), devices
