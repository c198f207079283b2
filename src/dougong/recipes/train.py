"""The story of a run: resolve, prepare, settle, train, score. Also how a stopped run goes on.

Every process of a run goes through the same story. What is measured or drawn from the disk is process 0's, sent to all
(`from_first`); process 0 alone makes the directory, speaks, and scores at the end.
"""

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from dougong import __version__
from dougong.adapt.lora import trained
from dougong.core.config import dump_yaml, replace, to_dict
from dougong.core.errors import CheckpointError, ConfigError, DougongError
from dougong.core.events import EventLog, read_events
from dougong.core.files import explained_disk_errors, lock, sha256, write_text
from dougong.core.run import RunDirectory
from dougong.models import count
from dougong.optim.groups import describe
from dougong.plan.machine import known_gpu
from dougong.recipes.answering import before_and_after
from dougong.recipes.assemble import Assembly, assemble, prepare_data, settle_intervals
from dougong.recipes.derive import Derived, fit_to_epochs, fit_to_processes, fit_to_rows, fit_to_time, resolve
from dougong.recipes.launch import launch_of, lay_out, nearest, remember_launch, run_of_launch
from dougong.recipes.open_run import check_same_data, load_tokenizer, open_run, runtime_here
from dougong.recipes.probe import measure_step
from dougong.recipes.recipe import Recipe, recipe_from_run
from dougong.recipes.scoring import check_scores, final_score, held_out_splits, quick_score
from dougong.recipes.start import as_it_lies
from dougong.recipes.teacher import infer_once, keeps_answers, student_alone
from dougong.runtime.device import Runtime, best_device, machine_facts, matmul_flops_per_s, peak_memory_bytes
from dougong.runtime.layout import AutoLayoutConfig, LayoutConfig
from dougong.runtime.processes import (
    STEP_TIMEOUT_S,
    first_alone,
    from_first,
    join,
    launched,
    process_rank,
    wait_for_all,
    wait_up_to,
)
from dougong.train import Checkpointer, fit, latest_valid, load_checkpoint
from dougong.train.hooks import Evaluate, Hooks, Sample, SaveCheckpoints, refuse_to_linger, stop_on_signals
from dougong.train.metrics import RankMeter, Reporter, StepMeter
from dougong.train.phases import Clock
from dougong.train.rewind import go_back
from dougong.train.state import TrainState
from dougong.train.trackers import check_trackers, open_trackers
from dougong.train.view import open_view
from dougong.train.watch import StoreBoard, Watch

_WATTS_PER_CORE, _WATTS_PER_GPU = 12.0, 700.0   # of a GPU that is not listed; stated in the report beside the estimate
_LOST_MACHINE_S = 120.0     # a file server may hold the locks of a machine that is gone for a while (NFSv4: 90 s)


@dataclass(frozen=True)
class Finished:
    """How a run ended: `reason` is "done", "early stop" or "interrupted"; `result` the final scores, if it was done.

    `was_done`: the run had already ended before, so resuming it changed nothing.
    """

    directory: RunDirectory
    step: int
    reason: str
    is_language_model: bool
    result: dict[str, Any] | None
    was_done: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"run": str(self.directory.path), "step": self.step, "reason": self.reason, "result": self.result}


def train_run(asked: Recipe, base: Recipe, *, path: Path | None = None, progress: Any = None) -> Finished:
    """Trains a recipe from its beginning in a new run directory (`path`, or runs/<name>; taken names get a number).

    Started again by torchrun after a failure, it goes on with the run that this launch began.
    """
    join(asked.runtime.device or best_device())
    path = path or Path("runs") / asked.name
    launch = launch_of(asked)
    if (begun := from_first(run_of_launch(path, launch))) is not None:
        return resume_run(Path(begun), layout=nearest(asked.layout, launched()), progress=progress)
    recipe, derived, corpus, runtime, stands_on = settle(asked, progress=progress)
    with explained_disk_errors(f"the run {path}"), contextlib.ExitStack() as held:
        made = _create(path, recipe, corpus, base, stands_on, launch, held) if process_rank() == 0 else None
        directory = RunDirectory(from_first(made))
        return _train(directory, recipe, corpus, derived, runtime, resumed=None)


def _create(path: Path, recipe: Recipe, corpus: Any, base: Recipe, stands_on: dict[str, str],
            launch: str | None, held: contextlib.ExitStack) -> Path:
    directory = RunDirectory.create(path.parent, path.name)
    held.enter_context(lock(directory.lock, owner="dougong train"))
    if recipe.is_language_model:
        corpus.tokenizer.save(directory.tokenizer)
    # what makes it a run, so everything that one needs is there
    write_recipe(directory, recipe, corpus, base=base, stands_on=stands_on)
    remember_launch(directory, launch)
    return directory.path


def resume_run(path: Path, *, layout: LayoutConfig | AutoLayoutConfig | None = None, progress: Any = None) -> Finished:
    """Goes on with a stopped run from its newest valid checkpoint, bit for bit as if it had not stopped.

    Nothing is measured again: precision, threads and steps are those of the recipe as saved. The number of processes
    and the layout may be others: the samples and their order stay, results agree to rounding. Raises CheckpointError
    where there is no run, its data changed, or another process trains it. A run that has ended is left as it is.
    """
    directory = RunDirectory.open(path)
    if (done := _already_done(directory)) is not None:
        return done
    with explained_disk_errors(f"the run {path}"), contextlib.ExitStack() as held:
        recipe, recorded = recipe_from_run(directory.recipe)
        recipe = as_it_lies(recipe, recorded, directory)
        if layout is not None and _stages(layout) != _stages(recipe.layout):    # rows at once are its micro-batches
            recipe = replace(recipe, train=replace(recipe.train, micro_rows=None))
        join(recipe.runtime.device or best_device())
        if process_rank() == 0:
            patience = _LOST_MACHINE_S if launched() > 1 else 0.0
            held.enter_context(lock(directory.lock, owner="dougong train", patience_s=patience))
        wait_for_all()
        corpus = prepare_data(recipe, progress=progress)
        check_same_data(recorded, corpus, directory.path)
        tokenizer = load_tokenizer(directory)
        if tokenizer is not None and tokenizer.fingerprint != corpus.tokenizer.fingerprint:
            raise CheckpointError(f"{directory.tokenizer} is not the tokenizer this run was trained with. Put it back.")
        runtime = Runtime.start(runtime_here(recipe.runtime),
                                lay_out(recipe, layout or nearest(recipe.layout, launched()))[0])
        return _train(directory, recipe, corpus, [], runtime, resumed=latest_valid(directory, runtime.mesh))


def _stages(layout: LayoutConfig | AutoLayoutConfig) -> int | None:
    return None if isinstance(layout, AutoLayoutConfig) else layout.pipeline


def _already_done(directory: RunDirectory) -> Finished | None:
    """How the run ended, if its last event says that it did and nothing is left to do."""
    events = read_events(directory.events)
    end = events[-1] if events and events[-1]["event"] == "end" else {}
    if end.get("reason") not in ("done", "early stop"):
        return None
    recipe, _ = recipe_from_run(directory.recipe)
    return Finished(directory, end["step"], end["reason"], recipe.is_language_model, last_result(directory),
                    was_done=True)


def settle(asked: Recipe, *, ask_teacher: bool = True,
           progress: Any = None) -> tuple[Recipe, list[Derived], Any, Runtime, dict[str, str]]:
    """Everything that is decided before the first step: derived values, data, measured speed, steps, intervals; and the
    fingerprints of the models that the run stands on.

    Without `ask_teacher`, a recipe that would ask its teacher about all of its text comes back as its student alone.
    """
    recipe, derived = from_first(resolve(asked) if process_rank() == 0 else None)
    check_trackers(recipe.train.trackers)
    recipe, rounded = fit_to_processes(asked, recipe, launched())
    layout, laid_out = lay_out(recipe)
    corpus = prepare_data(recipe, progress=progress)
    if asked.train.rows is None and launched() == 1:
        recipe, fewer = fit_to_rows(recipe, corpus.facts["splits"]["train"].get("rows"))
        derived += fewer
    if progress:
        progress(0, None, "measuring a few steps")
    runtime = Runtime.start(recipe.runtime, layout)
    if ask_teacher:
        infer_once(recipe, corpus, runtime, progress=progress)
    elif keeps_answers(recipe):
        recipe = replace(recipe, objective=student_alone(recipe))
    built = assemble(recipe, corpus, runtime=runtime)
    recipe, derived = built.recipe, derived + rounded + laid_out + built.derived
    check_scores(recipe, built.corpus)
    _check_samples(recipe, corpus)
    per_epoch, stands_on = built.state.loader.batches_per_epoch, built.fingerprints
    seconds = from_first(measure_step(built))
    recipe, from_epochs = fit_to_epochs(recipe, per_epoch)
    recipe, from_time = fit_to_time(recipe, seconds)
    recipe, intervals = settle_intervals(recipe, seconds)
    return recipe, derived + from_epochs + from_time + intervals, corpus, runtime, stands_on


def _check_samples(recipe: Recipe, corpus: Any) -> None:
    """Raises ConfigError for prompts that this tokenizer cannot spell: the first sample would end the run."""
    from dougong.generate.text import encode_prompt

    for prompt in recipe.sample.prompts if recipe.is_language_model else ():
        try:
            encode_prompt(corpus.tokenizer, prompt)
        except DougongError as error:
            raise ConfigError(f"sample.prompts: {prompt!r} cannot be continued: {error}\nGive prompts of your own "
                              "text, or none: 'sample.prompts=[]'.") from None


def write_recipe(directory: RunDirectory, recipe: Recipe, corpus: Any, *, base: Recipe,
                 stands_on: Mapping[str, str] | None = None) -> None:
    """recipe.yaml: the resolved recipe, and beside it what it was resolved with."""
    resolved = {"base": base.name, "dougong": __version__, "torch": torch.__version__,
                "data_fingerprint": corpus.fingerprint,
                **(stands_on or {}),
                "tokenizer_fingerprint": corpus.tokenizer.fingerprint if recipe.is_language_model else None}
    write_text(directory.recipe, dump_yaml(recipe) + dump_yaml({"resolved": resolved}))


def _train(directory: RunDirectory, recipe: Recipe, corpus: Any, derived: list[Derived], runtime: Runtime, *,
           resumed: Any) -> Finished:
    built = assemble(recipe, corpus, runtime=runtime)
    state = built.state
    _check_same_models(recipe_from_run(directory.recipe)[1], built)
    recipe_hash = sha256(directory.recipe)
    reporter = Reporter(EventLog(directory.events_of(process_rank())))
    problems = resumed.problems if resumed else []
    if resumed and resumed.path:
        load_checkpoint(resumed.path, state, recipe_hash=recipe_hash, mesh=runtime.mesh, checked=True)
    if resumed:
        state.elapsed_s = max(state.elapsed_s, _spent_s(directory))     # steps that a kill undid took their time too
    watchers = _watchers(directory, recipe, corpus, state.step) if runtime.is_first else []
    reporter.listeners += watchers
    try:
        peak = _announce(reporter, built, derived, state.step, resumed)
        for problem in problems:
            reporter.write("warning", message=f"checkpoint passed over: {problem}")
        _fit(reporter, built, directory, recipe_hash, peak)
        reason, final = state.stop or "done", None
        most = peak_memory_bytes(runtime.device)       # before the score, which takes memory of its own
        del built
        state.let_go()
        if reason != "interrupted":
            if runtime.is_first:
                watchers[-1].close()
            final = first_alone(f"score {directory.path}", lambda: _score_final(directory, reporter, corpus))
        _end(reporter, state, runtime, reason, peak_memory_bytes=most)
    except BaseException as error:
        with contextlib.suppress(OSError):   # on a full disk this cannot be written either; the first error is told
            _end(reporter, state, runtime, "failed", error=f"{type(error).__name__}: {error}"[:500])
        with contextlib.suppress(OSError):
            reporter.close()
        raise
    reporter.close()
    return Finished(directory, state.step, reason, recipe.is_language_model, final)


def _spent_s(directory: RunDirectory) -> float:
    """Seconds of training that the run had told of."""
    return max((event.get("elapsed_s") or 0.0 for event in read_events(directory.events)), default=0.0)


def _check_same_models(recorded: Mapping[str, Any], built: Assembly) -> None:
    """Raises CheckpointError where a model that the run stands on is no longer the one it recorded."""
    for name, found in built.fingerprints.items():
        if recorded.get(name, found) != found:
            raise CheckpointError(f"the {name.removesuffix('_fingerprint')} of this run has changed since it began "
                                  f"(fingerprint {recorded[name][:12]}, now {found[:12]}).\nPut that model back as it "
                                  "was, or start a new run.")


def _fit(reporter: Reporter, built: Assembly, directory: RunDirectory, recipe_hash: str, peak: float) -> None:
    """The steps, and what happens between them; back to an earlier checkpoint where leaps persist."""
    state, runtime, config = built.state, built.runtime, built.recipe.train
    clock, mesh = Clock(runtime.device), runtime.mesh
    checkpointer = Checkpointer(directory, recipe_hash=recipe_hash, keep_last=config.keep_last,
                                keep_best=config.keep_best, keep_every=config.keep_every, mesh=mesh)
    with stop_on_signals(state, mesh), _watch(clock, directory, reporter):
        hooks = Hooks(state, _hooks(reporter, built, directory, checkpointer, peak), clock)
        begins_at = state.step
        while True:
            for result in fit(state, built.objective, runtime, config, gradients=built.gradients,
                              directory=directory.path, clock=clock):
                if result.step == begins_at + 1:
                    wait_up_to(STEP_TIMEOUT_S, {None, *mesh.groups})
                hooks.run(result)
            if state.rewind is None:
                break
            reporter.write("rewind", **go_back(state, checkpointer, recipe_hash=recipe_hash))
        hooks.finish(state)


def _watch(clock: Clock, directory: RunDirectory, reporter: Reporter) -> contextlib.AbstractContextManager[Any]:
    """Of several processes each is watched, lest one that hangs leave the others waiting for ever."""
    if launched() == 1:
        return contextlib.nullcontext()
    return Watch(clock, StoreBoard(), rank=process_rank(), size=launched(), directory=directory.path,
                 on_hang=lambda fields: reporter.write("hang", **fields))


def _watchers(directory: RunDirectory, recipe: Recipe, corpus: Any, step: int) -> list[Any]:
    """Trackers and, last, the view for the person; they hear events and nothing else."""
    trackers = open_trackers(recipe.train.trackers, directory.tensorboard, run_name=directory.path.name,
                             recipe=to_dict(recipe), step=step)
    of_text = recipe.data.kind == "text" and not getattr(recipe.objective, "on_policy", None)
    view = open_view(directory.path.name, given(recipe.train.steps),
                     bytes_per_token=corpus.facts["bytes_per_token"] if of_text else None,
                     unit="tok/s" if recipe.is_language_model else "rows/s")
    return [*trackers, view]


def _hooks(reporter: Reporter, built: Assembly, directory: RunDirectory, checkpointer: Checkpointer,
           peak: float) -> list[Any]:
    recipe, state, config = built.recipe, built.state, built.recipe.train
    total_steps = given(config.steps)
    hooks: list[Any] = [
        StepMeter(reporter, every=config.log_every, total_steps=total_steps, device=built.runtime.device,
                  flops_per_token=built.flops_per_token, peak_flops_per_s=peak * launched(),
                  layers_every=config.log_layers_every) if built.runtime.is_first else
        RankMeter(reporter, every=config.log_every, total_steps=total_steps)]
    score = quick_score(recipe, built.corpus, built.runtime, objective=built.objective, divided=built.parallel,
                        poll=lambda: refuse_to_linger(state, built.runtime.mesh))
    if score is not None:
        hooks.append(Evaluate(reporter, lambda state: score(state.model), every=given(config.evaluate_every),
                              total_steps=total_steps, patience=config.patience))
    if recipe.is_language_model and recipe.sample.prompts:
        if built.is_whole:
            sampler = (lambda state: _write_samples(recipe, built, state.model)) if built.runtime.is_first else _nothing
            hooks.append(Sample(reporter, sampler, every=given(config.sample_every), total_steps=total_steps))
        else:
            reporter.write("warning", message="each process holds a part of the model, so nothing is sampled during "
                                              f"training; afterwards: dougong generate {quote(str(directory.path))}")
    hooks.append(SaveCheckpoints(reporter, checkpointer, every=given(config.checkpoint_every),
                                 total_steps=total_steps))
    return hooks


def _nothing(_state: Any) -> list[tuple[str, str]]:
    return []


def _write_samples(recipe: Recipe, built: Assembly, model: Any) -> list[tuple[str, str]]:
    from dougong.generate import SamplingConfig, generate

    sample = recipe.sample
    sampling = SamplingConfig(max_tokens=sample.tokens, temperature=sample.temperature, seed=recipe.seed,
                              top_p=sample.top_p if sample.temperature else None, long_prompt="truncate")
    written = generate(model, built.corpus.tokenizer, sample.prompts, sampling, runtime=built.runtime)
    return [(one.prompt, one.text) for one in written]


def _announce(reporter: Reporter, built: Assembly, derived: list[Derived], step: int, resumed: Any) -> float:
    """Writes what a reader needs before the first step; returns the measured peak FLOP/s."""
    runtime, recipe = built.runtime, built.recipe
    peak = matmul_flops_per_s(runtime.device, runtime.dtype)
    reporter.write("start", step=step, command=["dougong", *sys.argv[1:]], versions=versions(),
                   machine=machine_facts(runtime.device), precision=recipe.runtime.precision, threads=runtime.threads,
                   compile=runtime.compile, processes=launched(), layout=str(runtime.mesh.layout),
                   peak_flops_per_s=peak,
                   resumed_from=resumed.path.name if resumed and resumed.path else None)
    if resumed is None:
        reporter.write("derived", values=[item.to_dict() for item in derived])
    if not any(event["event"] == "model" for event in read_events(reporter.log.path)):   # or killed before it was told
        reporter.write("data", facts=built.corpus.facts)
        reporter.write("model", parameters=_parameters(built), flops_per_token=built.flops_per_token,
                       groups=describe(built.state.optimizer))
    if resumed is not None and resumed.path is None:
        reporter.write("warning", message="no valid checkpoint was found; training begins again at step 0")
    return peak


def _parameters(built: Assembly) -> dict[str, Any]:
    """Counts of the model; where an adapter is trained, also how many numbers that moves."""
    counted, adapt = count.parameters(built.recipe.model), built.recipe.adapter
    return counted if adapt is None else {**counted, "trained": trained(built.state.model)}


def _score_final(directory: RunDirectory, reporter: Reporter, corpus: Any) -> dict[str, Any] | None:
    """Scores the best checkpoint as it lies on disk, on the whole split; None where nothing was held out."""
    opened = open_run(directory.path, to_read=True)
    if opened.merged is not None:
        reporter.write("merged", **to_dict(opened.merged), step=opened.step)
    if not held_out_splits(corpus):
        reporter.write("warning", message="the data have no validation or test split, so there is no final score")
        return None
    result = final_score(opened.recipe, corpus, opened.model, opened.runtime, weights=opened.weights)
    reporter.write("result", **result, step=opened.step)
    if opened.recipe.start is not None and opened.recipe.data.kind == "chats":
        reporter.write("before_after", step=opened.step, **before_and_after(
            opened.recipe, corpus, opened.model, opened.runtime, result["split"]))
    return {**result, "step": opened.step}


def _end(reporter: Reporter, state: TrainState, runtime: Runtime, reason: str, **more: Any) -> None:
    watts, number, unit = _WATTS_PER_CORE, runtime.threads * launched(), "cores"
    if runtime.device.type == "cuda":
        found = torch.cuda.get_device_properties(runtime.device)
        kind = known_gpu(found.name, found.total_memory)
        watts, number, unit = kind.watts if kind else _WATTS_PER_GPU, launched(), "GPUs"
    reporter.write("end", step=state.step, reason=reason, elapsed_s=state.elapsed_s,
                   energy_wh=watts * number * state.elapsed_s / 3600,
                   energy_assumption=f"{watts:.0f} W for each of {number} {unit} while training, assumed and not "
                                     "measured",
                   **{"peak_memory_bytes": peak_memory_bytes(runtime.device), **more})


def versions() -> dict[str, str]:
    """What ran: needed to repeat it bit for bit."""
    import platform

    return {"dougong": __version__, "python": platform.python_version(), "torch": torch.__version__}


def last_result(directory: RunDirectory) -> dict[str, Any] | None:
    """The newest `result` event of a run."""
    return next((event for event in reversed(read_events(directory.events)) if event["event"] == "result"), None)


def given(value: int | None) -> int:
    """A value that `settle` has filled in."""
    assert value is not None
    return value


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    return replace(recipe, train=replace(recipe.train, steps=steps))
