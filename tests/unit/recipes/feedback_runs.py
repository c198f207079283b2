"""A base model of a second, pairs and tasks for it."""

import json
import random
from pathlib import Path

import yaml
from tiny_recipe import MODELS, dougong, write_recipe, write_texts

RUNTIME = {"device": "cpu", "precision": "fp32", "threads": 1, "compile": False}


def base_run(root: Path) -> Path:
    recipe = write_recipe(root / "tiny.yaml", write_texts(root / "texts", documents=20),
                          model={**MODELS["qwen3"], "context": 64},
                          train={"minutes": None, "steps": 6, "rows": 4, "trackers": [], "checkpoint_every": 6,
                                 "evaluate_every": 6, "sample_every": 6})
    done = dougong("train", recipe, "--run", root / "base")
    assert done.code == 0, done.err
    return root / "base"


def write_pairs(path: Path, count: int = 60) -> Path:
    """Two letters are asked for; preferred is the reply in which they come twice."""
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        a, b, c = (draw.choice("abcdefghij") for _ in range(3))
        lines.append({"prompt": f"{a}{b}{c} ", "chosen": f"{a}{b}{a}{b}", "rejected": f"{b}{a}{c}"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_tasks(path: Path, count: int = 40) -> Path:
    draw = random.Random(1)
    asked = ["".join(draw.choice("abcdefghij") for _ in range(3)) for _ in range(count)]
    path.write_text("".join(json.dumps({"question": text, "answer": text[0]}) + "\n" for text in asked))
    return path


def write_feedback_recipe(path: Path, base: str, data: dict, **changes) -> Path:
    train = {"steps": 6, "rows": 8, "trackers": [], "evaluate_every": 3, "sample_every": 6, "checkpoint_every": 2}
    values = {"base": base, "data": data, "runtime": RUNTIME, "optim": {"kind": "adamw", "lr": 1e-3},
              **changes, "train": {**train, **changes.get("train", {})}}
    path.write_text(yaml.safe_dump(values))
    return path
