"""Explains a run from its event files alone: why it was slow, and why it spiked. In sentences, tables and as data."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dougong.core.events import read_events
from dougong.core.run import RunDirectory
from dougong.report import numbers
from dougong.report.numbers import Text
from dougong.report.why_slow import Slow, SlowStep, where_time_went
from dougong.report.why_spiked import Layer, Spiked, Trouble, what_went_wrong
from dougong.report.words import say

_COMPUTING = ("forward", "backward", "optimizer")
_KEYS = {"evaluation": "train.evaluate_every", "sample": "train.sample_every", "checkpoint": "train.checkpoint_every"}
_WORTH_A_WORD = 0.1
"""share of the time from which on a phase gets a sentence"""
_TOO_SMALL = 5e-4
"""share below which a phase is not shown"""
_CHANGED = 1.15
_SHOWN = 20
Row = tuple[Text, ...]


@dataclass(frozen=True)
class Why:
    """An explained run. `slow` is None where events hold no phases."""

    name: str
    slow: Slow | None
    spiked: Spiked

    @property
    def slow_sentences(self) -> list[Text]:
        return _slow_sentences(self.slow)

    @property
    def spiked_sentences(self) -> list[Text]:
        return _spiked_sentences(self.spiked, self.slow.steps if self.slow else 0)

    def phase_rows(self) -> list[tuple[Text, Text, float]]:
        """(phase, seconds, share) of process 0."""
        slow = self.slow
        return [(say(f"phase_{name}"), numbers.duration(seconds), seconds / slow.total_s)
                for name, seconds in slow.phases.items()
                if seconds >= _TOO_SMALL * slow.total_s] if slow and slow.total_s else []

    def rank_table(self) -> tuple[list[Text], list[Row]]:
        """Heads and rows of mean seconds a step by process; nothing with one process."""
        if self.slow is None or len(self.slow.ranks) < 2:
            return [], []
        largest = [name for name in self.slow.phases
                   if any(own.get(name, 0.0) >= 0.01 * self.slow.step_s for own in self.slow.ranks.values())]
        rows = [(Text.same(rank), *(numbers.duration(own.get(name, 0.0)) for name in largest))
                for rank, own in list(self.slow.ranks.items())[:_SHOWN]]
        return [say("why_process"), *(say(f"phase_{name}") for name in largest)], rows

    def outlier_table(self) -> tuple[list[Text], list[Row]]:
        heads = [say("why_step"), say("why_time"), say("why_usual"), say("why_mostly")]
        return heads, [_outlier_row(one) for one in self.slow.outliers] if self.slow else []

    def trouble_table(self) -> tuple[list[Text], list[Row]]:
        heads = [say("why_step"), say("why_batch"), say("why_happened"), say("why_whose"), say("why_layer"),
                 say("why_documents")]
        return heads, [_trouble_row(one) for one in self.spiked.troubles[:_SHOWN]]

    @property
    def more_troubles(self) -> int:
        return max(0, len(self.spiked.troubles) - _SHOWN)

    def to_dict(self) -> dict[str, Any]:
        return {"run": self.name, "slow": self.slow.to_dict() if self.slow else None, "spiked": self.spiked.to_dict(),
                "sentences": [text.en for text in [*self.slow_sentences, *self.spiked_sentences]]}


def explain(run: RunDirectory) -> Why:
    """Reads events.jsonl and the logs of the other processes beside it."""
    logs = {0: read_events(run.events)}
    for path in sorted(run.path.glob("events-rank-*.jsonl")):
        logs[_rank_of(path)] = _counted_alike(read_events(path), logs[0])
    return Why(run.path.name, where_time_went(logs), what_went_wrong(logs))


def _counted_alike(events: list[dict[str, Any]], first: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Another process's events with the attempts that process 0 counts: a run resumed on more processes is the first
    attempt of those that are new."""
    begun = {event["attempt"]: event["time"] for event in first if event["event"] == "start"}
    alike = {event["attempt"]: min(begun, key=lambda own: abs(begun[own] - event["time"]), default=event["attempt"])
             for event in events if event["event"] == "start"}
    return [{**event, "attempt": alike.get(event["attempt"], event["attempt"])} for event in events]


def _rank_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _slow_sentences(slow: Slow | None) -> list[Text]:
    if slow is None:
        return [say("why_no_phases")]
    computing, step = numbers.percent(slow.share(*_COMPUTING)), numbers.duration(slow.step_s)
    found = []
    if len(slow.ranks) > 1:
        found.append(_straggler(slow.straggler))
    data = slow.share("data")
    if data >= _WORTH_A_WORD:
        found.append(say("why_input_bound", share=numbers.percent(data)))
    for phase, key in _KEYS.items():
        if slow.share(phase) >= _WORTH_A_WORD:
            name = say(f"phase_{phase}")
            found.append(say("why_between", phase=Text(name.en.capitalize(), name.zh),
                             share=numbers.percent(slow.share(phase)), setting=key))
    if slow.late_s > _CHANGED * slow.early_s or slow.early_s > _CHANGED * slow.late_s:
        found.append(say("why_slower" if slow.late_s > slow.early_s else "why_faster",
                         early=numbers.duration(slow.early_s), late=numbers.duration(slow.late_s)))
    if slow.outliers:
        found.append(say("why_slow_steps", n=len(slow.outliers) + slow.more_outliers,
                         time=numbers.duration(slow.outliers_cost_s)))
    head = say("why_computing" if found else "why_nothing_slow", share=computing, step=step)
    if data < _WORTH_A_WORD and (slow.straggler or {}).get("phase") != "data":
        found.append(say("why_not_input_bound", share=numbers.percent(data, 1)))
    if slow.mfu:
        found.append(say("why_mfu", mfu=numbers.percent(slow.mfu)))
    return [head, *found]


def _straggler(found: dict[str, Any] | None) -> Text:
    if found is None:
        return say("why_even")
    return say("why_straggler", rank=found["rank"], late=numbers.duration(found["late_s"]),
               share=numbers.percent(found["share"]), phase=say(f"phase_{found['phase']}"),
               wait=numbers.duration(found["others_wait_s"]))


def _spiked_sentences(spiked: Spiked, steps: int) -> list[Text]:
    skips, faults, leaps = spiked.of("skip"), spiked.of("fault"), spiked.of("leap")
    found = []
    if skips:
        found.append(say("why_skipped", n=len(skips), steps=numbers.exact(steps) if steps else "–"))
    often = Counter(name for trouble in skips for name in trouble.documents)
    if repeated := [name for name, count in often.most_common(3) if count > 1]:
        found.append(say("why_data", documents=", ".join(repeated)))
    if faults:
        ranks = sorted({rank for fault in faults for rank in fault.ranks})
        where = say("why_where", ranks=", ".join(map(str, ranks))) if ranks else Text.same("")
        found.append(say("why_faults", n=len(faults), where=where))
    if leaps:
        found.append(say("why_leaps", n=len(leaps)))
    for event in spiked.rewinds:
        found.append(say("why_rewind", step=event["step"], to=event["to_step"], first=event["first_batch"],
                         last=event["last_batch"]))
    for event in spiked.hangs:
        for one in event.get("processes", [])[:3]:
            found.append(say("why_hang", rank=one["rank"], step=one["step"] + 1, phase=say(f"phase_{one['phase']}"),
                             time=numbers.duration(event["waited_s"])))
    return found or [say("why_nothing_wrong")]


def _outlier_row(one: SlowStep) -> Row:
    phase = say(f"phase_{one.phase}")
    if one.rank is not None:
        process = say("why_process")
        phase = Text(f"{phase.en} ({process.en} {one.rank})", f"{phase.zh}（{process.zh} {one.rank}）")
    if one.step == 1:
        first = say("why_first_step")
        phase = Text(f"{phase.en}; {first.en}", f"{phase.zh}；{first.zh}")
    return numbers.exact(one.step), numbers.duration(one.seconds), numbers.fixed(one.times, 1), phase


def _trouble_row(one: Trouble) -> Row:
    happened = say("why_taken", reason=one.reason) if one.kind != "skip" else Text.same(one.reason)
    documents = one.documents
    shown = ", ".join(documents[:3]) + (f" (+{len(documents) - 3})" if len(documents) > 3 else "")
    return (numbers.exact(one.step), numbers.exact(one.batch) if one.batch is not None else numbers.UNKNOWN, happened,
            _whose(one), _layer(one.layer), Text.same(shown or "–"))


def _whose(one: Trouble) -> Text:
    if one.verdict == "transient" and one.ranks:
        return say("why_transient_rank", ranks=", ".join(map(str, one.ranks)))
    return say({"persistent": "why_persistent", "transient": "why_transient"}.get(one.verdict or "", "why_unknown"))


def _layer(layer: Layer | None) -> Text:
    if layer is None:
        return numbers.UNKNOWN
    if layer.all_at_once:
        return say("why_all_layers", step=numbers.exact(layer.step))
    if layer.times is None:
        return say("why_layer_nan", layer=layer.name, step=numbers.exact(layer.step))
    return say("why_layer_is", layer=layer.name, step=numbers.exact(layer.step),
               times=numbers.significant(layer.times, 2))
