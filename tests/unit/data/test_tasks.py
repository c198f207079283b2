"""Made tasks and questions: the answers are right, and what is held out is never trained on."""

import ast
import fnmatch
import re

import pytest

from dougong.core.errors import ConfigError
from dougong.data import python_questions
from dougong.data.chat_sources import Found
from dougong.data.python_questions import PythonQuestions, functions_in, held_out_modules, split_of
from dougong.data.sources import PythonSource
from dougong.data.tasks import REFUSAL, SKILLS, Tasks, is_balanced, tasks
from dougong.data.walk import Skipped


def solved(skill, prompt):
    """The answer by another way than the one that made it."""
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    if skill == "addition":
        return str(sum(numbers))
    if skill == "reversed_addition":
        return "".join(reversed(str(sum(numbers))))
    if skill == "sorting":
        return " ".join(sorted(prompt.removeprefix("Sort: ").split(), key=int))
    if skill == "largest":
        return str(sorted(numbers)[-1])
    if skill == "brackets":
        text = prompt.removeprefix("Balanced? ")
        while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", text)) != text:
            text = shorter
        return "no" if text else "yes"
    if skill == "counting":
        letter, word = re.fullmatch(r"How many (.) are in (.*)\?", prompt).groups()
        return str(len(re.findall(letter, word)))
    return prompt.removeprefix("Repeat: ") if skill == "copying" else REFUSAL


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_right_and_held_out_prompts_never_train(skill):
    found = {split: tasks(skill, split, seed=3, items=300, levels=(1, 3)) for split in ("train", "validation", "test")}
    for items in found.values():
        assert all(item.answer == solved(skill, item.prompt) and item.is_right(f" {item.answer}\n") for item in items)
    prompts = {split: {item.prompt for item in items} for split, items in found.items()}
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert not prompts["validation"] & prompts["test"]
    assert {item.difficulty for item in found["train"]} == {1, 2, 3}
    assert len({item.answer for item in found["test"]}) > 1 or skill == "declining"


def test_an_item_is_the_same_whenever_it_is_asked_for():
    one = tasks("sorting", "test", seed=1, items=50)
    assert one[7] == list(one)[7] == tasks("sorting", "test", seed=1, items=9000)[7] == one[5:9][2]
    assert one[7] != tasks("sorting", "test", seed=2, items=50)[7] and one[-1] == one[49]
    with pytest.raises(IndexError):
        one[50]


def test_both_kinds_of_brackets_are_frequent():
    answers = [item.answer for item in tasks("brackets", items=400)]
    assert 0.4 < answers.count("yes") / 400 < 0.6
    assert is_balanced("a(b)[{}]") and not is_balanced("([)]") and not is_balanced("(")


def test_as_conversations_they_know_their_split():
    found = list(Tasks(skills=("addition",), items=20).stream(Found()))
    assert [one.split for one in found].count("train") == 20 and len(found) == 24
    assert found[0].answer == found[0].messages[1]["content"]
    with pytest.raises(ConfigError, match="Did you mean 'sorting'"):
        Tasks(skills=("sortin",))


CODE = '''
class Queue:
    def put(self, item):
        """Put an item into the queue.

        It may block.
        """
        # a comment
        self.items.append(item)

    def _hidden(self):
        """Never shown to anyone."""
        return 1

def bare(x):
    return x
'''


def test_functions_are_shown_without_their_docstring():
    only, = functions_in("lib/queue.py", CODE)
    assert (only.module, only.name, only.sentence) == ("lib.queue", "Queue.put", "Put an item into the queue.")
    assert only.code == "def put(self, item):\n    # a comment\n    self.items.append(item)"


@pytest.fixture(scope="module")
def questions():
    return list(PythonQuestions().stream(Found()))


def test_questions_about_this_python(questions):
    by_skill = {}
    for one in questions:
        by_skill.setdefault(one.skill, []).append(one)
    assert all(len(by_skill[skill]) > 500 for skill in ("describe", "docstring", "which"))
    for one in by_skill["which"]:
        assert f"\n- {one.answer}" in one.messages[0]["content"]
    for one in by_skill["docstring"][:200]:
        code = re.search(r"```python\n(.*)\n```", one.messages[0]["content"], re.DOTALL)[1]
        assert ast.get_docstring(ast.parse(code).body[0]) is None


def test_held_out_modules_are_held_out_of_questions_and_of_text(questions):
    held, patterns = {one.id.split("/")[0] for one in questions if one.split != "train"}, held_out_modules()
    assert 0.03 < len([one for one in questions if one.split == "test"]) / len(questions) < 0.12
    left = {name for name, _ in PythonSource(exclude=patterns).files(Skipped())}
    gone = {name for name, _ in PythonSource().files(Skipped())} - left
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in left}
    assert gone and all(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name in gone)
    assert not [name for name in held if any(name.startswith(f"{module}.") and split_of(module) != "train"
                                             for module in modules)]
    assert {split_of("json.decoder"), split_of("json")} == {split_of("json.encoder")}
    assert split_of("_pydecimal") == split_of("decimal")
    skipped = Skipped()
    list(PythonSource(exclude=patterns).files(skipped))
    assert skipped.facts()["excluded"]["count"] == len(gone)


def test_modules_for_other_pythons_are_passed_over():
    assert list(functions_in("a.py", "print 'old'")) == []
    assert python_questions._package("_pydecimal") == "decimal"
