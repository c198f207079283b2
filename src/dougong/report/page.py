"""Writes the report: facts → one HTML file with its style, script, charts and numbers, that loads nothing.

The content security policy allows only the very style and script written here (by their hashes), so even text
that slipped through escaping could not run or call out.
"""

import base64
import hashlib
import json
import shlex
from pathlib import Path, PurePath
from typing import Any

import jinja2
from markupsafe import Markup

import dougong
from dougong.core.errors import ConfigError
from dougong.core.files import write_text
from dougong.core.run import RunDirectory
from dougong.report import numbers
from dougong.report.baselines import comparison
from dougong.report.before_after import read_before_after
from dougong.report.compare import only_seeds_differ, recipe_differences, side_by_side
from dougong.report.curves import charts_of, clocks_of, table_of
from dougong.report.data_view import plain, view_of
from dougong.report.facts import Attempt, RunFacts, read_facts
from dougong.report.headline import headline
from dougong.report.numbers import Text, is_number
from dougong.report.plot import x_range
from dougong.report.why import Why, explain
from dougong.report.words import say, word

_HERE = Path(__file__).parent
_MOMENTS, _PROMPTS, _CHARACTERS = 7, 6, 1500
"""samples shown: moments for each prompt, prompts, characters of each"""


def write_report(runs: list[RunDirectory], out: Path) -> Path:
    """Writes one page about one run, or about several side by side, and returns its path.

    Raises ConfigError without a run and CheckpointError for a directory that is none.
    """
    if not runs:
        raise ConfigError("a report needs at least one run. Give a run directory, such as runs/first.")
    write_text(out, render([read_facts(run) for run in runs], explain(runs[0]) if len(runs) == 1 else None))
    return out


def render(runs: list[RunFacts], why: Why | None = None) -> str:
    """The page as a string; `why` explains the run where there is one."""
    charts = charts_of(runs)
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    clocks = [clock.payload() for clock in clocks_of(runs)]
    domain = x_range([line for chart in charts for line in chart.lines])
    payload = {
        "charts": {c.key: c.payload() for c in charts},
        "runs": [{"name": run.name, **clock} for run, clock in zip(runs, clocks)],
    }
    template = _environment().get_template("page.html")
    return template.render(
        runs=runs,
        single=len(runs) == 1,
        charts=charts,
        x_domain=domain,
        sections=_sections(runs[0], why),
        why=why,
        axes=_axes(runs, clocks),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        payload=_json(payload),
        rows=side_by_side(runs) if len(runs) > 1 else [],
        seeds_only=only_seeds_differ(runs),
        differences=recipe_differences(runs) if len(runs) > 1 else [],
        version=dougong.__version__,
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {
        "say": say,
        "word": word,
        "plain": plain,
        "same": Text.same,
        "n": numbers,
        "is_number": is_number,
        "headline": headline,
        "comparison": comparison,
        "data_view": view_of,
        "table_of": table_of,
        "samples_of": samples_of,
        "last_samples": last_samples,
        "before_after": read_before_after,
        "commands_of": commands_of,
        "time_parts": time_parts,
        "machine_of": machine_of,
        "ended": ended,
        "status_note": status_note,
        "parameters_of": parameters_of,
        "newest_checkpoint": newest_checkpoint,
        "recipe_command": recipe_command,
    }
    return environment


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> Markup:
    """JSON that no HTML parser can leave: `<`, `>` and `&` are written as escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _sections(run: RunFacts, why: Why | None) -> list[str]:
    """Those of one run's page: without a result that never comes, or samples of one that does not write."""
    sections = ["result", "curves", "before_after", "samples", "data", "model", "cost", *(["why"] if why else []),
                "reproduce"]
    if comparison(run) is None and run.status == "done":
        sections.remove("result")
    if not run.before_after:
        sections.remove("before_after")
    if not run.samples and (run.before_after or not run.is_text):
        sections.remove("samples")
    return sections


def _axes(runs: list[RunFacts], clocks: list[dict[str, Any]]) -> list[tuple[str, Text]]:
    """The x axes that every run can show."""
    names = {
        "step": say("x_step"),
        "tokens": say("x_tokens" if runs[0].is_text else "x_examples"),
        "minutes": say("x_minutes"),
    }
    return [(key, name) for key, name in names.items() if all(key in clock for clock in clocks)]


def samples_of(run: RunFacts) -> tuple[list[dict[str, Any]], int]:
    """Samples by prompt, each with its moments in order, and how many prompts were left out."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        by_prompt.setdefault(str(sample.get("prompt") or ""), []).append(sample)
    groups = []
    for prompt, samples in list(by_prompt.items())[:_PROMPTS]:
        moments = _thinned(samples)
        groups.append(
            {
                "prompt": prompt,
                "total": len(samples),
                "moments": [
                    {
                        "step": s["step"],
                        "text": _continuation(prompt, s.get("text")),
                        "score": _score_at(run, s["step"]),
                    }
                    for s in moments
                ],
            }
        )
    return groups, max(0, len(by_prompt) - _PROMPTS)


def last_samples(runs: list[RunFacts]) -> list[dict[str, Any]]:
    """For each prompt that any run has: the last text of every run."""
    prompts = dict.fromkeys(str(s.get("prompt") or "") for run in runs for s in run.samples)
    found = []
    for prompt in list(prompts)[:_PROMPTS]:
        texts = []
        for run in runs:
            mine = [s for s in run.samples if str(s.get("prompt") or "") == prompt]
            texts.append(
                {"step": mine[-1]["step"], "text": _continuation(prompt, mine[-1].get("text"))}
                if mine
                else None
            )
        found.append({"prompt": prompt, "texts": texts})
    return found


def _thinned(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """First and last, and between them denser at the beginning, where most changes."""
    if len(samples) <= _MOMENTS:
        return samples
    last = len(samples) - 1
    wanted = [last * (i / (_MOMENTS - 1)) ** 1.7 for i in range(_MOMENTS)]
    index: list[int] = []
    for place, w in enumerate(wanted):
        low = index[-1] + 1 if index else 0
        index.append(min(max(low, round(w)), last - (_MOMENTS - 1 - place)))
    return [samples[i] for i in index]


def _continuation(prompt: str, text: Any) -> str:
    """What the model added; a text that repeats its prompt loses it."""
    text = str(text if text is not None else "")
    text = text.removeprefix(prompt) if prompt else text
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + " …"


def _score_at(run: RunFacts, step: float) -> Text | None:
    """The bits per byte evaluated nearest before or at a sample, so that text and number stand together."""
    known = [e for e in run.evaluations if e["step"] <= step and is_number(e.get("bits_per_byte"))]
    if not known:
        return None
    value = numbers.fixed(known[-1]["bits_per_byte"], 2)
    return Text(f"{value.en} bits / byte", f"{value.zh} 比特/字节")


def commands_of(run: RunFacts) -> list[str]:
    """What was typed, for every attempt: the first makes the run, the others continued it."""
    return [command for a in run.attempts if (command := _command(a.start.get("command")))]


def _command(argv: Any) -> str | None:
    if isinstance(argv, str):
        return argv or None
    if not isinstance(argv, list) or not argv:
        return None
    words = [str(w) for w in argv]
    program = PurePath(words[0])
    if program.name == "dougong":
        words[0] = "dougong"
    elif program.name in ("__main__.py", "main.py") and "dougong" in program.parts:
        words[:1] = ["python", "-m", "dougong"]
    return shlex.join(words)


def recipe_command(run: RunFacts) -> tuple[str, str]:
    """(file name, command) that trains from the resolved recipe. The name needs no quoting."""
    name = str(run.recipe.get("name") or run.name)
    file = "".join(c if c.isalnum() or c in "._-" else "-" for c in name) + ".yaml"
    return file, shlex.join(["dougong", "train", file])


def time_parts(run: RunFacts) -> list[tuple[Text, Text, float]]:
    """(what, how long, share) of the time that the run accounted for. What is written beside training costs it nothing:
    of samples and checkpoints counts for how long it stood still."""
    parts = [
        ("time_training", run.training_s),
        ("time_evaluation", run.evaluation_s),
        ("time_samples", run.waits.get("sample")),
        ("time_checkpoints", run.waits.get("checkpoint")),
    ]
    known = [(key, float(seconds)) for key, seconds in parts if seconds]
    total = sum(seconds for _, seconds in known)
    return [(say(key), numbers.duration(seconds), seconds / total) for key, seconds in known]


def machine_of(run: RunFacts) -> list[tuple[Text, Text]]:
    """The machine, the frozen choices and the versions of the newest attempt."""
    start = next((a.start for a in reversed(run.attempts) if a.start), {})
    rows = []
    for key, value in (start.get("machine") or {}).items():
        rows.append(
            (
                word(key),
                numbers.memory_size(value) if key == "memory_bytes" and is_number(value) else plain(value),
            )
        )
    rows += [
        (word(key), plain(start[key]))
        for key in ("precision", "threads", "compile")
        if start.get(key) is not None
    ]
    if is_number(start.get("peak_flops_per_s")):
        rows.append((say("peak_flops_per_s"), numbers.flops_rate(start["peak_flops_per_s"])))
        mfu = run.series.median("mfu")
        if mfu:
            rows.append((say("model_flops"), say("of_peak", mfu=numbers.percent(mfu, 1))))
    return rows + [(Text.same(key), plain(value)) for key, value in (start.get("versions") or {}).items()]


def parameters_of(run: RunFacts) -> list[tuple[Text, Text, float]]:
    """(part, count, share of the total): the parts, which add up to the total, and the total."""
    counted = run.model.get("parameters") or {}
    parts, total = counted.get("by_part"), counted.get("total")
    if not is_number(total) or not total:
        return []
    named = parts.items() if isinstance(parts, dict) else ()
    rows = [(Text.same(name), value) for name, value in named if is_number(value)]
    return [(name, numbers.exact(value), value / total) for name, value in [*rows, (say("total"), total)]]


def newest_checkpoint(run: RunFacts) -> Text | None:
    found = [c for c in run.checkpoints if is_number(c.get("step"))]
    if not found:
        return None
    newest = max(found, key=lambda c: c["step"])
    return say(
        "checkpoints_are",
        n=len({c["step"] for c in found}),
        step=numbers.exact(newest["step"]),
        size=numbers.data_size(newest["bytes"]) if is_number(newest.get("bytes")) else Text.same("–"),
    )


def ended(run: RunFacts, attempt: Attempt) -> Text:
    if attempt.end:
        reason = str(attempt.end.get("reason"))
        return (
            say(f"end_{reason}")
            if reason in ("done", "interrupted", "early stop", "failed")
            else Text.same(reason)
        )
    return say("end_running" if run.status == "running" and attempt is run.attempts[-1] else "end_silent")


def status_note(run: RunFacts) -> Text:
    """How far the run came; for a run that is not over, out of how much."""
    total = (
        (run.recipe.get("train") or {}).get("steps") if isinstance(run.recipe.get("train"), dict) else None
    )
    step = numbers.exact(run.last_step)
    if run.end.get("reason") == "early stop" and run.status == "done":
        early = say("early_stop")
        return Text(f"{early.en}, step {step.en}", f"{early.zh}，第 {step.zh} 步")
    if is_number(total) and run.status != "done":
        return say("at_step_of", step=step, total=numbers.exact(total))
    return say("at_step", step=step)
