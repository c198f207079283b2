"""A process of its own for a reward that others wrote: it may loop for ever, and then it is ended from outside.

    python reward_worker.py FILE FUNCTION        calls FUNCTION(reply, task) of that file
    python reward_worker.py --regex PATTERN      1.0 where the pattern occurs in the reply

Reads one JSON object a line ({"reply", "task"}), answers one ({"value"} or {"error"}); the first answer says that it is
ready. What the function prints goes to standard error. Imports nothing of dougong.
"""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any


def load(arguments: list[str]) -> Callable[[str, dict[str, Any]], Any]:
    if arguments[0] == "--regex":
        pattern = re.compile(arguments[1], re.DOTALL)
        return lambda reply, task: pattern.search(reply) is not None
    path, name = arguments
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location("reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reward"] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        function = load(sys.argv[1:])
    except BaseException as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"value": 0.0})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer({"value": float(function(asked["reply"], asked["task"]))})
        except BaseException as error:
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
