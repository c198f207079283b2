"""What a run looks like while it trains: a live panel on a terminal, plain lines elsewhere. Both only read
events."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dougong.data.walk import left_out

_LINE_EVERY_S = 10.0


def open_view(name: str, total_steps: int, *, bytes_per_token: float | None = None, unit: str = "tok/s",
              stream: TextIO | None = None) -> "LiveView | PlainView":
    """The view that fits the stream (standard error): live on a terminal, lines in a file or pipe.

    `bytes_per_token` where the loss is of all text, and so of its bytes; `unit` is what throughput counts.
    """
    stream = sys.stderr if stream is None else stream
    assert stream is not None
    numbers = Numbers(name, total_steps, bytes_per_token, unit)
    console = Console(file=stream)
    return LiveView(numbers, console) if console.is_terminal and not console.is_dumb_terminal else PlainView(
        numbers, stream)


class Numbers:
    """The latest of everything, and how long the rest will take."""

    def __init__(self, name: str, total_steps: int, bytes_per_token: float | None, unit: str = "tok/s") -> None:
        self.name, self.total_steps, self.bytes_per_token, self.unit = name, total_steps, bytes_per_token, unit
        self.last: dict[str, dict[str, Any]] = {}
        self.skips = 0
        self._bests: list[dict[str, Any]] = []
        self._first: dict[str, Any] | None = None

    def take(self, record: dict[str, Any]) -> None:
        self.last[record["event"]] = record
        if record["event"] == "skip":
            self.skips += 1
        if record["event"] == "evaluation" and record.get("best"):
            self._bests.append(record)
        if record["event"] == "rewind":     # what is left is measured by the steps from there
            self._first = None
            self._bests = [best for best in self._bests if best["step"] <= record["to_step"]]
        if record["event"] == "step" and self._first is None:
            self._first = record

    @property
    def best(self) -> dict[str, Any] | None:
        """The best evaluation, of those on the way that was not left."""
        return self._bests[-1] if self._bests else None

    @property
    def step(self) -> dict[str, Any]:
        return self.last.get("step", {})

    def remaining_s(self) -> float | None:
        """Steps left times the mean wall time of a step since this attempt's first (evaluations included)."""
        first, now = self._first, self.step
        if first is None or now["step"] == first["step"]:
            return None
        per_step = (now["time"] - first["time"]) / (now["step"] - first["step"])
        return (self.total_steps - now["step"]) * per_step

    def training_bits_per_byte(self) -> float | None:
        loss = self.step.get("loss")
        return None if loss is None or not self.bytes_per_token else loss / math.log(2) / self.bytes_per_token

    def fields(self) -> list[tuple[str, str]]:
        """(label, value) pairs of the latest step, absent ones left out."""
        step = self.step
        pairs = [("loss", _form(step.get("loss"), "{:.4f}")),
                 ("bpb", _form(self.training_bits_per_byte(), "{:.3f}")),
                 ("acc", _form(step.get("accuracy"), "{:.1%}")), ("lr", _form(step.get("lr"), "{:.2e}")),
                 ("norm", _form(step.get("grad_norm"), "{:.2f}")),
                 (self.unit, _form(step.get("tokens_per_s"), "{:,.0f}")),
                 ("mfu", _form(step.get("mfu"), "{:.0%}")),
                 ("mem", _form(step.get("memory_bytes"), "{}", _size)),
                 ("skipped", str(self.skips) if self.skips else "")]
        return [(label, value) for label, value in pairs if value]

    def evaluation(self) -> str:
        """The last evaluation in one line, with the best one where it was another."""
        found = self.last.get("evaluation")
        if found is None:
            return ""
        best = "best so far" if found.get("best") else (
            f"best {_score(self.best).rpartition(', ')[2]} at step {self.best['step']:,}"
            if self.best else "")
        return f"step {found['step']:,} · {_score(found)}" + (f" · {best}" if best else "")


class PlainView:
    """A line every ten seconds, and one for each evaluation, sample, checkpoint, skip and warning."""

    def __init__(self, numbers: Numbers, stream: TextIO, *, every_s: float = _LINE_EVERY_S,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.numbers, self.stream, self.every_s, self.clock = numbers, stream, every_s, clock
        self._printed_at = -math.inf

    def __call__(self, record: dict[str, Any]) -> None:
        numbers = self.numbers
        numbers.take(record)
        line = _ALWAYS.get(record["event"], lambda _n, _r: "")(numbers, record)
        last = record.get("step") == numbers.total_steps
        if record["event"] == "step" and (last or self.clock() - self._printed_at >= self.every_s):
            self._printed_at = self.clock()
            fields = [*numbers.fields(), ("eta", _duration(numbers.remaining_s()))]
            line = f"step {record['step']:>6,}/{numbers.total_steps:,}  " + "  ".join(map(" ".join, fields))
        if line:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Nothing to put back."""


class LiveView:
    """A panel that redraws itself four times a second at most."""

    def __init__(self, numbers: Numbers, console: Console) -> None:
        self.numbers = numbers
        self._live = Live(self.render(), console=console, refresh_per_second=4, transient=False)
        self._live.start()

    def __call__(self, record: dict[str, Any]) -> None:
        self.numbers.take(record)
        if record["event"] in ("data", "warning", "skip", "fault", "rewind") and (
                line := _ALWAYS[record["event"]](self.numbers, record)):
            self._live.console.print(Text(line, style="yellow"))
        self._live.update(self.render())

    def close(self) -> None:
        self._live.stop()

    def render(self) -> Panel:
        numbers = self.numbers
        done = numbers.step.get("step", 0)
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        percent = done / max(1, numbers.total_steps)
        head.add_row(ProgressBar(total=numbers.total_steps, completed=done, complete_style="cyan"),
                     f"{percent:4.0%}  step {done:,}/{numbers.total_steps:,}  "
                     f"[bold]{_duration(numbers.step.get('elapsed_s'))}[/] < "
                     f"{_duration(numbers.remaining_s())}")
        line = Text()
        for label, value in numbers.fields():
            line.append(f"{label}\u00a0", style="dim")
            line.append(value.replace(" ", "\u00a0"), style="bold").append("   ")
        parts: list[Any] = [head, line]
        if evaluation := numbers.evaluation():
            parts.append(Text.assemble(("eval ", "dim"), (evaluation, "green")))
        if sample := numbers.last.get("sample"):
            parts.append(Text.assemble(("says ", "dim"), (_one_line(sample["prompt"]), "bold"),
                                       (_one_line(sample["text"]), "italic"), no_wrap=True,
                                       overflow="ellipsis"))
        return Panel(Group(*parts), title=f"[bold]{numbers.name}[/]", title_align="left", border_style="cyan",
                     padding=(0, 1))


def _data(record: dict[str, Any]) -> str:
    found = left_out(record["facts"].get("skipped") or {})
    return f"data        {found} (named in the report and by: dougong data inspect)" if found else ""


def _score(record: dict[str, Any]) -> str:
    scores = [_form(record.get("loss"), "loss {:.4f}"),
              _form(record.get("bits_per_byte"), "{:.4f} bits per byte"),
              _form(record.get("accuracy"), "accuracy {:.1%}")]
    return ", ".join(score for score in scores if score)


_ALWAYS: dict[str, Callable[[Numbers, dict[str, Any]], str]] = {
    "data": lambda numbers, record: _data(record),
    "evaluation": lambda numbers, record: f"evaluation  {numbers.evaluation()}",
    "sample": lambda numbers, record: (f"sample      {_one_line(record['prompt'])}▸"
                                       f"{_one_line(record['text'])}"),
    "checkpoint": lambda numbers, record: (f"checkpoint  {record['path']} ({_size(record['bytes'])}, "
                                           f"{record['reason']})"),
    "skip": lambda numbers, record: f"skipped     step {record['step']:,}: {record['reason']}",
    "fault": lambda numbers, record: (f"computed again: step {record['step']:,}, because "
                                      f"{record['fault']['reason']}; the second time was good"),
    "rewind": lambda numbers, record: (f"going back  from step {record['step']:,} to {record['to_step']:,}; batches "
                                       f"{record['first_batch']:,} to {record['last_batch']:,} are passed over"),
    "warning": lambda numbers, record: f"warning     {record['message']}",
}


def _form(value: Any, form: str, convert: Callable[[Any], Any] = lambda value: value) -> str:
    return "" if value is None else form.format(convert(value))


def _one_line(text: str) -> str:
    return text.replace("\n", "⏎")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
