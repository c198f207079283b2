"""What replies earn, and what happens to rewards that raise, are no numbers or never return."""

import math
import time

import pytest

from dougong.adapt.rewards import Reply, Rewards, Task
from dougong.core.errors import ConfigError, DataError


def reply(text, answer="42", tokens=()):
    return Reply(Task(({"role": "user", "content": "?"},), answer), text, tokens)


def earned(spec, *replies, **settings):
    return Rewards(spec, **settings)(list(replies))


def test_exact_contains_and_numeric_read_the_answer():
    assert earned("exact", reply(" 42\n"), reply("42!")) == [1, 0]
    assert earned("contains", reply("it is 42."), reply("it is 4 2")) == [1, 0]
    assert earned("numeric", reply("6 × 7 = 42.0"), reply("42 or 43"), reply("none"), reply("4,200e-2")) == [1, 0, 0, 1]


@pytest.mark.parametrize(("said", "answer"), [
    ("it is 0.5", ".5"), ("-.5", "-0.5"), ("it is \u22122", "-2"), ("-2", "\u22122"), ("in 2020-2021", "2021"),
    ("10-5", "5"), ("x=-3", "-3"), ("7 - 4", "4"), ("1,234.5.", "1234.5"), ("2e\u22121", ".2"),
    ("pick 1,2", "2"), ("10,20", "20"), ("1,234,5", "5"), ("12,345,678", "12345678"), ("1234,567", "567")])
def test_a_number_may_be_written_in_other_ways(said, answer):
    assert earned("numeric", reply(said, answer)) == [1]


def test_a_pattern_may_span_lines_and_a_length_falls_off_on_both_sides():
    assert earned("regex:^a.*z$", reply("a\nz"), reply("az!")) == [1, 0]
    assert earned("length:4", reply("", tokens=(1,) * 4), reply("", tokens=(1,) * 3), reply("", tokens=(1,) * 9)) == [
        1, 0.75, 0]


@pytest.fixture
def rewards_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("""
import time
calls = []

def vowels(reply, task):
    print("counted")                        # must not be taken for an answer
    return sum(letter in "aeiou" for letter in reply) / max(1, len(reply))

def knows_the_task(reply, task):
    return task["answer"] == "42" and task["prompt"][0]["content"] == "?"

def nothing(reply, task): return float("nan")
def raises(reply, task): raise KeyError(reply)
def hangs(reply, task):
    while reply == "hang":
        time.sleep(0.01)
    return 1.0
def leaves(reply, task):
    import os
    os._exit(3)
""")
    return path


def test_a_function_of_a_file_is_called_with_reply_and_task(rewards_file):
    assert earned(f"{rewards_file}:vowels", reply("aabb"), reply("")) == [0.5, 0]
    assert earned(f"{rewards_file}:knows_the_task", reply("x")) == [1]


@pytest.mark.parametrize("function,what", [("nothing", "gave nan"), ("raises", "raised KeyError"),
                                           ("leaves", "ended its process")])
def test_a_reward_that_fails_is_an_error_that_names_the_reply(rewards_file, function, what):
    with pytest.raises(DataError, match=what) as error:
        Rewards(f"{rewards_file}:{function}", seconds=120)([reply("this one")])
    assert "'this one'" in str(error.value) and "on_error=zero" in str(error.value)


@pytest.mark.parametrize("function", ["nothing", "raises", "leaves"])
def test_or_it_counts_zero_and_is_counted(rewards_file, function):
    rewards = Rewards(f"{rewards_file}:{function}", on_error="zero")
    assert rewards([reply("a"), reply("b")]) == [0, 0] and rewards.failed == 2


def test_a_reward_that_never_returns_is_ended_and_the_next_reply_is_rewarded(rewards_file):
    rewards = Rewards(f"{rewards_file}:hangs", on_error="zero", seconds=0.5)
    begin = time.monotonic()
    assert rewards([reply("fine"), reply("hang"), reply("fine")]) == [1, 0, 1] and rewards.failed == 1
    assert time.monotonic() - begin < 30
    with pytest.raises(DataError, match=r"did not return within 0.5 s"):
        earned(f"{rewards_file}:hangs", reply("hang"), seconds=0.5)


def test_a_pattern_that_explodes_is_ended_too():
    rewards = Rewards("regex:(a+)+$", on_error="zero", seconds=0.5)
    assert rewards([reply("a" * 40 + "!")]) == [0] and rewards.failed == 1


def test_tests_are_run_on_the_code_of_the_reply():
    tests = "assert add(2, 3) == 5"
    good, bad = "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a - b\n"
    assert earned("tests", reply(good, tests), reply(f"Here:\n```python\n{good}```\nDone.", tests), reply(bad, tests),
                  reply("no code at all", tests)) == [1, 1, 0, 0]


@pytest.mark.parametrize("spec,message", [
    ("exakt", "Did you mean 'exact'"), ("regex:(", "cannot be read"), ("length:0", "Known forms"),
    ("absent.py:f", "there is no file absent.py"), ("model:runs/x", "Known forms")])
def test_unknown_rewards_say_what_there_is(spec, message):
    with pytest.raises(ConfigError, match=message):
        Rewards(spec)


def test_a_file_without_the_function_says_so(rewards_file):
    with pytest.raises(ConfigError, match="cannot be used: AttributeError"):
        earned(f"{rewards_file}:absent", reply("x"))


def test_a_value_that_is_no_number_never_becomes_a_reward():
    rewards = Rewards("exact")
    rewards._reward = lambda replies: [math.inf] * len(replies)
    with pytest.raises(DataError, match="gave inf"):
        rewards([reply("x")])
