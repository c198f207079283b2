"""Questions about the functions of the Python installation, with the answers that their authors gave.

Whole modules are held out: no question about them is trained on, and `held_out_modules()` names their files, so that a
model which reads the standard library first can be kept from them too (`{kind: python, exclude: …}`).
"""

import ast
import hashlib
import platform
import random
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from dougong.core.config import config
from dougong.data.chat_sources import ChatSource, Found
from dougong.data.conversations import Conversation
from dougong.data.decode import NotText, read_text
from dougong.data.sources import PythonSource
from dougong.data.walk import Skipped
from dougong.runtime.seeds import derive

Skill = Literal["describe", "docstring", "which", "arguments"]
_BORDERS = (0.88, 0.94)     # of a module's hash: training below the first, validation below the second, then test
_SALT = "9"                 # chosen so that either held-out part has about a twentieth of CPython 3.11's functions
_OTHERS = 3                 # functions beside the right one that "which" offers
_LONG_DOCSTRING = 500       # characters; longer ones are manuals
_FOLDERS_LEFT_OUT = ("lib2to3", "idlelib", "turtledemo", "ensurepip", "pydoc_data", "encodings")


@dataclass(frozen=True)
class Function:
    """A function with a docstring: its dotted name in its module, its code without the docstring."""

    module: str
    name: str
    code: str
    docstring: str

    @cached_property
    def sentence(self) -> str:
        """The docstring's first sentence on one line; empty where it says too little or too much to be an answer."""
        first = " ".join(self.docstring.split("\n\n")[0].split())
        found = re.match(r".*?[.!?](?=\s|$)", first)
        sentence = found[0] if found else first
        return sentence if 3 <= len(sentence.split()) <= 40 and not sentence.startswith(("--", ">>>", "(")) else ""


@config
class PythonQuestions(ChatSource):
    """What a function of the standard library does, its docstring, and which function does what."""

    kind: Literal["python_questions"] = "python_questions"
    skills: tuple[Skill, ...] = ("describe", "docstring", "which")
    """describe: code to the first sentence of its docstring; docstring: code to all of it; which: that sentence to the
    one of four functions that it belongs to; arguments: a first line to the names of its arguments"""
    code_characters: int = Field(default=1000, ge=100)
    """longest function shown"""

    def about(self) -> dict[str, Any]:
        return {"python": platform.python_version(), "implementation": platform.python_implementation()}

    def inventory(self) -> Iterator[tuple[str, int, int]]:
        return PythonSource(tests=False).inventory()

    def conversations(self, found: Found) -> Iterator[Conversation]:
        for file in module_files():
            if "arguments" in self.skills:
                yield from self._arguments(*file)
            functions = [one for one in functions_in(*file) if len(one.code) <= self.code_characters]
            for number, function in enumerate(functions):
                for skill in (skill for skill in self.skills if skill in _ASK):
                    if (pair := _ASK[skill](function, functions, number)) is not None:
                        yield self._conversation(function, skill, *pair)

    def _arguments(self, file: str, text: str) -> Iterator[Conversation]:
        """Of every function with arguments, documented or not."""
        module = _module_of(file)
        for node in _parsed_functions(text):
            given = node.args
            every = (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg)
            if names := [one.arg for one in every if one is not None]:
                line = f"def {node.name}({ast.unparse(_bare(given))}):"
                yield Conversation(
                    f"{module}.{node.name}:{node.lineno}/arguments", self.label,
                    ({"role": "user", "content": f"Arguments of: {line}"},
                     {"role": "assistant", "content": ", ".join(names)}),
                    skill="arguments", answer=", ".join(names), split=split_of(module))

    def _conversation(self, function: Function, skill: str, question: str, reply: str) -> Conversation:
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": reply})
        return Conversation(f"{function.module}.{function.name}/{skill}", self.label, messages, skill=skill,
                            answer=reply if skill == "which" else None, split=split_of(function.module))


def _describe(function: Function, *_: Any) -> tuple[str, str] | None:
    if not function.sentence:
        return None
    return f"What does this function do?\n\n{_fenced(function.code)}", function.sentence


def _docstring(function: Function, *_: Any) -> tuple[str, str] | None:
    if not function.sentence or len(function.docstring) > _LONG_DOCSTRING:
        return None
    return f"Write the docstring of this function.\n\n{_fenced(function.code)}", f'"""{function.docstring}"""'


def _which(function: Function, functions: list[Function], number: int) -> tuple[str, str] | None:
    others = sorted({one.name for one in functions} - {function.name})
    if not function.sentence or len(others) < _OTHERS or sum(o.sentence == function.sentence for o in functions) > 1:
        return None
    source = random.Random(derive(0, "which", function.module, function.name, number))
    offered = sorted([function.name, *source.sample(others, _OTHERS)], key=lambda _: source.random())
    listed = "\n".join(f"- {name}" for name in offered)
    return f"Which function of the module {function.module} does this?\n{function.sentence}\n\n{listed}", function.name


_ASK = {"describe": _describe, "docstring": _docstring, "which": _which}


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def module_files() -> Iterator[tuple[str, str]]:
    """(name of the file in the standard library, its text), tests and what is generated left out."""
    source = PythonSource(tests=False)
    for name, path in source.files(Skipped()):
        if name.endswith(".py") and not name.startswith(_FOLDERS_LEFT_OUT):
            try:
                yield name, "".join(read_text(path))
            except (NotText, OSError):
                continue


def functions_in(file: str, text: str) -> Iterator[Function]:
    """The documented functions and methods of one file whose names are public, in order."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):      # a file for another version of Python
        return
    yield from _functions(tree, _module_of(file), "", text.splitlines())


def _module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _parsed_functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _bare(arguments: ast.arguments) -> ast.arguments:
    """Without annotations."""
    for one in ast.walk(arguments):
        if isinstance(one, ast.arg):
            one.annotation = None
    return arguments


def _functions(parent: ast.AST, module: str, prefix: str, lines: list[str]) -> Iterator[Function]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, module, f"{prefix}{node.name}.", lines)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            docstring, said = ast.get_docstring(node), node.body[0]
            if docstring and len(node.body) > 1 and said.lineno > node.lineno and node.end_lineno:
                kept = lines[node.lineno - 1:said.lineno - 1] + lines[said.end_lineno:node.end_lineno]
                code = textwrap.dedent("\n".join(line.rstrip() for line in kept)).strip("\n")
                yield Function(module, prefix + node.name, code, docstring.strip())


def split_of(module: str) -> str:
    """The split of a module: that of the package it is part of, and of the public module that it serves."""
    place = int.from_bytes(hashlib.sha256(f"{_SALT}{_package(module)}".encode()).digest()[:7], "little") / 2 ** 56
    return "train" if place < _BORDERS[0] else "validation" if place < _BORDERS[1] else "test"


def _package(module: str) -> str:
    """`json` for json.decoder, `decimal` for _pydecimal."""
    name = module.split(".")[0]
    return name.removeprefix("_py") if name.startswith("_py") else name.lstrip("_")


def held_out_modules() -> tuple[str, ...]:
    """Patterns over the files of the Python installation that no training text should hold, for `exclude` of the source
    `python`: the held-out modules, and the tests about them."""
    held: dict[str, None] = {}
    for name, _ in PythonSource().files(Skipped()):
        first, *inside = name.split("/")
        if first == "test" and inside:
            first, *inside = inside
            if first.startswith("test_") and split_of(first.removeprefix("test_").removesuffix(".py")) != "train":
                held[f"test/{first}/*" if inside else name] = None
        elif name.endswith(".py") and split_of(first.removesuffix(".py")) != "train":
            held[f"{first}/*" if inside else name] = None
    return tuple(held)
