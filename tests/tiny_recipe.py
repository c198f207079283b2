"""A recipe of a second: two layers on a generated folder, with dropout and an average, so that resuming has to put back
every kind of state."""

import contextlib
import io
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from dougong.cli.main import main

STEPS = 24
MODELS = {
    "nano": {"kind": "nano", "dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "context": 32},
    "gpt2": {"kind": "gpt2", "dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "context": 32},
    "llama": {"kind": "llama", "dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
              "ffn_dim": 64, "context": 32},
    "qwen3": {"kind": "qwen3", "dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
              "ffn_dim": 64, "context": 32},
}


def write_texts(folder: Path, *, documents: int = 60, words: int = 200) -> Path:
    """A folder of documents in an invented language: seeded, so the same everywhere."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 7))) for _ in range(300)]
    folder.mkdir(parents=True)
    for number in range(documents):
        text = " ".join(rng.choice(vocabulary) for _ in range(words))
        (folder / f"{number:03d}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def write_recipe(path: Path, texts: Path, **changes) -> Path:
    """The recipe as a YAML file at `path`; `changes` replace whole sections."""
    recipe = {
        "base": "first", "name": path.stem, "size": None, "data": {"path": str(texts)}, "tokenizer": "bytes",
        "model": {**MODELS["nano"], "dropout": 0.1}, "optim": {"kind": "muon", "lr": 0.01, "adamw_lr": 0.003},
        "train": {"minutes": None, "steps": STEPS, "rows": 8, "micro_rows": 4, "ema": {"decay": 0.9},
                  "evaluate_every": 6, "sample_every": 12, "checkpoint_every": 4, "trackers": []},
        "sample": {"prompts": ["ab"], "tokens": 8}, "evaluate": {"tokens": 500},
        "runtime": {"device": "cpu", "precision": "fp32", "threads": 1, "compile": False}} | changes
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out.splitlines()[-1])


def dougong(*arguments: object) -> Outcome:
    """Runs the real entry point in this process."""
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["dougong", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    finally:
        sys.argv = argv
    return Outcome(code, out.getvalue(), err.getvalue())
