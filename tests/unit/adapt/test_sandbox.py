"""Code that a model wrote cannot hang, fill, reach or pass without passing."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from dougong.adapt import sandbox
from dougong.adapt.sandbox import code_of, isolation, run_tests


def test_passing_means_that_the_tests_ran_to_their_end():
    assert run_tests("x = 1", "assert x == 1").passed
    failed = run_tests("x = 1", "assert x == 2, 'not two'")
    assert not failed.passed and failed.reason == "AssertionError: not two"
    assert run_tests("def broken(:", "").reason.startswith("SyntaxError")


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit()"])
def test_ending_early_is_not_passing(code):
    assert not run_tests(code, "assert False").passed


def test_a_loop_is_ended_with_all_that_it_started(tmp_path):
    begin = time.monotonic()
    verdict = run_tests("while True: pass", "", seconds=1)
    assert not verdict.passed and time.monotonic() - begin < 20
    sleeping = run_tests("import time; time.sleep(60)", "", seconds=0.5)
    assert sleeping.timed_out and "0.5 s" in sleeping.reason


@pytest.mark.parametrize("said", ["1", "[2]", "{", "null", ""])
def test_nonsense_in_the_verdicts_pipe_is_not_passing(said):
    code = f"import os, sys; os.write(int(sys.argv[1]), {said.encode()}); os._exit(0)"
    assert not run_tests(code, "").passed


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start processes in it")
def test_what_flees_from_the_session_and_holds_the_pipe_keeps_no_one_waiting(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", tuple)
    flees = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(8)\n    os._exit(0)\n"
    begin = time.monotonic()
    assert not run_tests(flees + "os._exit(0)", "", seconds=1).passed
    assert run_tests(flees, "", seconds=1).passed and time.monotonic() - begin < 6


def test_memory_files_and_open_files_are_bounded():
    assert "MemoryError" in run_tests("x = bytearray(1 << 32)", "", memory_bytes=256 << 20).reason
    assert not run_tests("open('f', 'wb').write(bytes(5 << 20))", "").passed
    assert "OSError" in run_tests("kept = [open('f', 'w') for _ in range(100)]", "").reason


def test_it_has_a_directory_of_its_own_that_vanishes_and_no_secrets_in_its_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "xyz")
    code = "import os; here = os.getcwd(); open('mine', 'w').write('x'); names = dict(os.environ)"
    assert run_tests(code, "assert 'SECRET_TOKEN' not in names and here == names['HOME'] and 'sandbox' in here").passed
    assert not list(Path(tempfile.gettempdir()).glob("dougong-sandbox-*/mine"))


def test_it_reaches_no_network_where_the_system_can_take_it_away():
    if not isolation():
        pytest.skip("no user namespaces here")
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        verdict = run_tests(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)", "")
    assert not verdict.passed and "Error" in verdict.reason


def test_the_code_of_a_reply_stands_between_fences_or_is_all_of_it():
    assert code_of("x = 1") == "x = 1"
    assert code_of("Look:\n```python\nx = 1\n```\nand ```y```") == "x = 1\n"
