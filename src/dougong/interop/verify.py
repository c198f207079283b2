"""Is what was written what was trained? Token ids, chat rendering and logits of an independent reader beside ours.

The yardstick is our own model in float64. Two correct programs in float32 both stray from it by rounding, and by about
as much; so the other program may stray by `SLACK` times what ours does, and never has to be nearer than `FLOOR`, the
rounding of a few sums. A wrong constant (say, eps=1e-6 for 1e-5) strays ten times further than that.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from dougong.core.errors import CheckpointError

SLACK = 8.0
"""times our own rounding; right programs were seen at 1 to 2 times, and rounding is a matter of luck"""
FLOOR = 2e-6
"""share of the largest logit; float32 rounds at 6e-8, and a logit is a sum of tens to thousands of such terms"""
TIPPED = 0.1
"""share of the largest logit that a row may stray by where rounding tipped the choice of experts"""
TEXT_TOKENS = 96
"""tokens of each text that logits are compared on"""

UNUSUAL = (
    "", " ", "\n\n\t  x\r\n", "Hello, world! It's 12,345.67 — “quoted”, isn't it?", 
    "def f(x):\n    return x ** 2  # ok",
    "斗拱是中国古代建筑特有的构件。", "Ünïcödé naïve café ﬁ", "العربية עברית हिन्दी ไทย 한국어",
    "\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 e\u0301 a\u200bb",
    "a" * 70 + " " * 40 + "0123456789" * 3, "\x00\x07\ufffd\U0010ffff",
)
"""what tokenizers tend to disagree on"""


class Mismatch(CheckpointError):
    """What was written is not what was trained; the message says where it first differs."""


@dataclass(frozen=True)
class Verified:
    """What was compared, and how far apart it was."""

    reader: str
    texts: int
    tokens: int
    largest_difference: float
    """between the reader's logits and ours in float64, as a share of the largest logit"""
    allowed: float
    own_rounding: float
    """the same of ours in float32"""
    tipped: int = 0
    """rows in which rounding tipped the choice of experts, which are not among the above"""
    tipped_difference: float = 0.0
    """the largest difference in them"""

    def sentence(self) -> str:
        """One line for people."""
        return (f"verified with {self.reader}: token ids of {self.texts} texts are equal; logits of {self.tokens:,} "
                f"tokens differ by {self.largest_difference:.1e} of the largest at most ({self.allowed:.1e} allowed, "
                f"rounding of our own: {self.own_rounding:.1e})"
                + (f"; rows in which rounding tips the choice of experts: {self.tipped}, which differ by up to "
                   f"{self.tipped_difference:.1e}." if self.tipped else "."))


def compare_ids(texts: Sequence[str], ours: Callable[[str], Any], theirs: Callable[[str], Any],
                reader: str) -> None:
    """Raises Mismatch at the first text whose token ids differ."""
    for text in texts:
        a, b = list(map(int, ours(text))), list(map(int, theirs(text)))
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y)
            raise Mismatch(f"{reader} reads {text[:60]!r} as other tokens: at position {at} it has "
                           f"{b[at] if at < len(b) else 'no token'}, the run's tokenizer "
                           f"{a[at] if at < len(a) else 'no token'}.")


def compare_logits(model: nn.Module, reader: Callable[[Tensor], Any], rows: Sequence[Sequence[int]], name: str, *,
                   texts: int, layers: Callable[[Tensor], dict[str, Tensor]] | None = None) -> Verified:
    """Compares logits on rows of token ids. Raises Mismatch naming row, position and, where the reader gives its
    `layers`, the first layer that differs.

    `model` is ours with the weights as they were written (rounded, if they were). Of experts each token visits the
    likeliest few, and rounding may tip a near tie, in either program; so a mixture of experts passes when most rows
    agree and the others are near, while a wrong weight or constant shows in all of them.
    """
    assert rows, "nothing to compare"
    single, exact = _in_precision(model, torch.float32), _in_precision(model, torch.float64)
    found: list[tuple[float, float, float]] = []
    failed: list[tuple[float, str]] = []
    for number, row in enumerate(rows):
        tokens = torch.tensor([list(row)])
        with torch.no_grad():
            truth = exact(tokens).double()
            own = single(tokens).double()
            theirs = _logits(reader(tokens)).double()
        if theirs.shape != truth.shape:
            raise Mismatch(f"{name} gives logits of shape {tuple(theirs.shape)} for {len(row)} tokens, ours are "
                           f"{tuple(truth.shape)}.")
        for who, logits in (("the run's model", own), (name, theirs)):
            if not bool(torch.isfinite(logits).all()):
                raise Mismatch(f"{who} gives logits that are no numbers (NaN or infinity) in row {number}.")
        scale = truth.abs().max().clamp(min=1e-30)
        apart = (theirs - truth).abs().amax(-1)[0] / scale
        rounding = ((own - truth).abs().max() / scale).item()
        allowed = min(max(SLACK * rounding, FLOOR), TIPPED)     # our own rounding may tip a choice too
        if bool((apart <= allowed).all()):
            found.append((apart.max().item(), allowed, rounding))
            continue
        at = int((apart > allowed).nonzero()[0])
        failed.append((apart.max().item(),
                       f"row {number}, position {at}: logits differ by {apart[at].item():.1e} of the largest, "
                       f"{allowed:.1e} allowed." + (_first_layer(exact, layers, tokens) if layers else "")))
    furthest = max((apart for apart, _ in failed), default=0.0)
    if failed and (not _has_experts(model) or 2 * len(failed) > len(rows) or furthest > TIPPED):
        raise Mismatch(f"{name} computes something else than the run's model.\n  {failed[0][1]}")
    return Verified(name, texts, sum(len(row) for row in rows), *max(found), len(failed), furthest)


@contextlib.contextmanager
def readable(reader: str) -> Iterator[None]:
    """Turns whatever a reader raises about what was written into a Mismatch."""
    try:
        yield
    except Exception as error:   # readers raise errors of every kind
        raise Mismatch(f"{reader} cannot read what was written: {type(error).__name__}: {str(error)[:500]}") from error


def rows_of(ids: Sequence[Any], *, first: int | None, context: int, rows: int = 12) -> list[list[int]]:
    """Texts as rows of at most `TEXT_TOKENS` tokens, each after the token that begins a document; the longest ones."""
    begin = [] if first is None else [first]
    cut = [[*begin, *map(int, one)][:min(TEXT_TOKENS, context)] for one in ids]
    return sorted((row for row in cut if row), key=len, reverse=True)[:rows]


def hidden_states(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """What enters each layer of ours, what leaves the final norm, and the logits, by name."""
    seen: dict[str, Any] = {}
    stack, norm = model.stack, model.norm
    assert isinstance(stack, nn.ModuleDict) and isinstance(norm, nn.Module)

    def entering(name: str) -> Callable[..., None]:
        return lambda _module, args: seen.update({name: args[0]})

    hooks = [layer.register_forward_pre_hook(entering(name)) for name, layer in stack.items()]
    hooks.append(norm.register_forward_hook(lambda _m, _a, out: seen.update({"the final norm": out})))
    try:
        with torch.no_grad():
            seen["the head"] = model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return {("the embedding" if name == "0" else f"layer {int(name) - 1}" if name.isdigit() else name): value
            for name, value in seen.items()}


def _first_layer(exact: nn.Module, layers: Callable[[Tensor], dict[str, Tensor]], tokens: Tensor) -> str:
    ours, theirs = hidden_states(exact, tokens), layers(tokens)
    for name, value in ours.items():
        if name in theirs and theirs[name].shape == value.shape:
            scale = value.abs().max().clamp(min=1e-30)
            apart = ((theirs[name].double() - value).abs().max() / scale).item()
            if not apart <= 1e-4:
                return f" First to differ: {name} ({apart:.1e})."
    return " No single layer differs by more than 1e-4: rounding, or a small constant."


def _in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    other = copy.deepcopy(model).to(device="cpu", dtype=dtype).eval()
    other.compute_dtype = dtype  # type: ignore[assignment]
    return other


def _has_experts(model: nn.Module) -> bool:
    from dougong.nn.moe import MoE

    return any(isinstance(module, MoE) for module in model.modules())


def _logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)
