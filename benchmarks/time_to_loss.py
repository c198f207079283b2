"""How long until the loss: recipe `shakespeare_char_cpu` beside nanoGPT's published CPU setting, and `shakespeare_char`
against the loss that nanoGPT publishes for an A100.

    python benchmarks/time_to_loss.py [--quick] [--json PATH] [--text FILE] [--seeds N]

Control: GPT-2's layout, 4 layers, width 128, context 64, batch 12, 2,000 steps, AdamW 1e-3 → 1e-4 cosine, fp32,
dropout 0, characters of tiny Shakespeare, first 90 % for training. Losses are over the full validation split, every
character but the first, in windows of each model's own context. Times are wall times from the first step, compilation
included; imports, data preparation and evaluation are not. The contenders take turns, seed by seed.
Asked: the control's final loss in at most a tenth of its time; at equal time at least 0.35 nats lower; and
`shakespeare_char` at most 1.4697 in at most 12 minutes, the mean over seeds.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import header, spread, write
from torch import nn

from dougong.core.config import replace
from dougong.recipes.assemble import assemble, prepare_data
from dougong.recipes.derive import resolve
from dougong.recipes.recipe import load_recipe
from dougong.recipes.scoring import quick_score
from dougong.train import fit
from dougong.train.hooks import aside

TEXTS = ("../shared/data/tinyshakespeare.txt", "tinyshakespeare.txt")
A100_LOSS, A100_MINUTES = 1.4697, 12
EQUAL_TIME = ["model.num_layers=4", "optim.adamw_lr=0.01", "optim.lr=0.03"]


class ControlBlock(nn.Module):
    """A GPT-2 layer as one writes it: LayerNorm, PyTorch's attention, GELU."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Control(nn.Module):
    """nanoGPT's CPU model: 4 layers of 128, 4 heads, context 64, tied head."""

    def __init__(self, vocabulary: int, *, dim: int = 128, layers: int = 4, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.context = context
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(ControlBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (2 * layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[:tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def train_control(text: str, seed: int, *, steps: int = 2000, rows: int = 12) -> dict[str, float]:
    """Seconds and full validation loss of the control."""
    torch.manual_seed(seed)
    characters = sorted(set(text))
    number = {character: index for index, character in enumerate(characters)}
    ids = torch.tensor([number[character] for character in text])
    cut = int(len(ids) * 0.9)
    training, held_out = ids[:cut], ids[cut:]
    model = Control(len(characters))
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.99))
    begin = time.perf_counter()
    for step in range(steps):
        progress = (step - 100) / (steps - 100)
        rate = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 0.5 * (1 + math.cos(math.pi * progress)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(training) - model.context, (rows,))
        batch = torch.stack([training[s:s + model.context + 1] for s in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "loss": _full_loss(model, held_out)}


@torch.no_grad()
def _full_loss(model: Control, ids: torch.Tensor) -> float:
    """Mean nats of every character but the first, in disjoint windows."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, model.context):
        window = ids[start:start + model.context + 1][None]
        total += F.cross_entropy(model(window[:, :-1])[0], window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    return total / count


def train_recipe(name: str, text: Path, seed: int, overrides: list[str], *, curve: int = 0) -> dict[str, Any]:
    """Seconds and full validation loss of a recipe; with `curve`, the loss at that many places on the way too."""
    recipe, _ = resolve(load_recipe(name, [f"data.path={text}", f"seed={seed}", *overrides])[0])
    corpus = prepare_data(recipe)
    built = assemble(recipe, corpus)
    score = quick_score(replace(built.recipe, evaluate=replace(recipe.evaluate, tokens=1 << 40)), corpus, built.runtime)
    assert score is not None
    points = []
    for result in fit(built.state, built.objective, built.runtime, built.recipe.train):
        if curve and result.step % max(1, recipe.train.steps // curve) == 0:
            with aside(built.state):
                points.append({"step": result.step, "seconds": built.state.elapsed_s,
                               "loss": score(built.state.model)["loss"], "training_loss": result.metrics["loss"]})
    with aside(built.state):
        found = score(built.state.model)
    return {"seed": seed, "seconds": built.state.elapsed_s, "loss": found["loss"], "steps": recipe.train.steps,
            **({"curve": points} if curve else {})}


def race(text: Path, seeds: int) -> dict[str, Any]:
    """The control and the recipe in turns; then the recipe stretched to the control's time."""
    controls, recipes, equal = [], [], []
    characters = text.read_text()
    for seed in range(seeds):
        controls.append(train_control(characters, seed))
        recipes.append(train_recipe("shakespeare_char_cpu", text, seed, []))
        print(f"seed {seed}: control {controls[-1]['loss']:.4f} in {controls[-1]['seconds']:.1f} s; "
              f"shakespeare_char_cpu {recipes[-1]['loss']:.4f} in {recipes[-1]['seconds']:.2f} s", flush=True)
        probe = train_recipe("shakespeare_char_cpu", text, seed, [*EQUAL_TIME, "train.steps=40"])
        steps = int(0.97 * controls[-1]["seconds"] / probe["seconds"] * 40)
        equal.append(train_recipe("shakespeare_char_cpu", text, seed, [*EQUAL_TIME, f"train.steps={steps}"]))
        print(f"        at equal time {equal[-1]['loss']:.4f} in {equal[-1]['seconds']:.1f} s", flush=True)
    control_loss = statistics.mean(row["loss"] for row in controls)
    loss = statistics.mean(row["loss"] for row in recipes)
    shares = [b["seconds"] / a["seconds"] for a, b in zip(controls, recipes)]
    gains = [a["loss"] - b["loss"] for a, b in zip(controls, equal)]
    print(f"\nloss {loss:.4f} against the control's {control_loss:.4f}, in {statistics.median(shares):.3f} of its time "
          f"(asked: ≤ 0.100)\nat equal time {statistics.mean(gains):.3f} nats lower (asked: ≥ 0.35)\n", flush=True)
    return {"control": controls, "recipe": recipes, "equal_time": equal, "share_of_time": spread(shares),
            "gain_nats": spread(gains), "reached_loss": loss <= control_loss}


def a100(text: Path, seeds: int) -> dict[str, Any]:
    """`shakespeare_char`, with its curve of loss against minutes."""
    runs = []
    for seed in range(seeds):
        runs.append(train_recipe("shakespeare_char", text, seed, [], curve=14))
        print(f"shakespeare_char seed {seed}: {runs[-1]['loss']:.4f} in {runs[-1]['seconds'] / 60:.2f} minutes "
              "(final weights)", flush=True)
    loss = statistics.mean(run["loss"] for run in runs)
    minutes = statistics.mean(run["seconds"] for run in runs) / 60
    print(f"\nmean {loss:.4f} in {minutes:.2f} minutes (asked: ≤ {A100_LOSS} in ≤ {A100_MINUTES})")
    for point in runs[0]["curve"]:
        print(f"  {point['seconds'] / 60:5.2f} min  {point['loss']:.4f}")
    return {"runs": runs, "mean_loss": loss, "mean_minutes": minutes, "asked_loss": A100_LOSS,
            "asked_minutes": A100_MINUTES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed of the race: about two minutes")
    parser.add_argument("--json", help="write the report here")
    parser.add_argument("--text", help="tiny Shakespeare, one text file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("race", "a100"), help="one part alone")
    options = parser.parse_args()
    report = header()
    path = next((Path(p) for p in ([options.text] if options.text else TEXTS) if Path(p).is_file()), None)
    if path is None:
        print("SKIPPED: the text is absent. It is `data/tinyshakespeare/input.txt` of the public repository\n"
              "karpathy/char-rnn (1,115,394 characters); give it with --text FILE.")
        return
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "tinyshakespeare.txt"
        text.write_bytes(path.read_bytes())
        if options.only != "a100":
            report["race"] = race(text, 1 if options.quick else options.seeds)
        if options.only == "a100" or not (options.quick or options.only):
            report["a100"] = a100(text, options.seeds)
    write(options.json, report)


if __name__ == "__main__":
    main()
