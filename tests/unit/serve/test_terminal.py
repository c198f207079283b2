"""`dougong chat`: its conversation, its commands, and the command itself in a terminal of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from live_server import CONTEXT, tiny_engine

from dougong.core.errors import ConfigError
from dougong.data.tokenizer import BytesConfig
from dougong.generate import SamplingConfig, generate
from dougong.serve.terminal import Conversation


@pytest.fixture
def talk():
    return Conversation(tiny_engine(), BytesConfig().build(), {"temperature": 0, "max_tokens": 12})


def say(talk, text):
    return "".join(talk.answer(text))


def test_a_base_model_continues_the_text(talk):
    assert talk.mode == "continue"
    first = say(talk, "hello ")
    second = say(talk, "")
    whole = generate(talk.engine, talk.tokenizer, ["hello "], SamplingConfig(temperature=0, max_tokens=24))[0].text
    if "\ufffd" not in first + second:
        assert first + second == whole
    assert whole.startswith(first) and [turn["role"] for turn in talk.turns] == ["user", "assistant", "assistant"]
    assert (talk.written, talk.answers) == (12, 2) and talk.seconds > 0


def test_a_chat_goes_through_the_template_and_drops_what_no_longer_fits(talk):
    talk.command("/mode chat")
    talk.command("/system be kind")
    say(talk, "hi")
    request, _ = talk._request()
    assert bytes(request.prompt[1:]).startswith(b"be kind\n\nUser: hi\nAssistant: ")
    for _ in range(12):
        say(talk, "some more words to fill the context")
    request, _ = talk._request()
    assert len(request.prompt) <= CONTEXT - 12 and bytes(request.prompt[1:]).startswith(b"be kind\n\nUser: some")
    before = list(talk.turns)
    with pytest.raises(ConfigError, match="no room"):
        say(talk, "x" * CONTEXT)
    assert talk.turns == before


def test_closing_an_answer_stops_its_work_and_keeps_what_came(talk):
    talk.command("/set max_tokens=200")
    pieces = talk.answer("go")
    came = "".join(next(pieces) for _ in range(10))
    pieces.close()
    assert talk.turns[-1] == {"role": "assistant", "content": came} and talk.written == 10
    assert (talk._scheduler.running, talk._scheduler.waiting) == (0, 0)
    assert say(talk, "on")


def test_the_cache_is_what_free_memory_holds_and_one_context_at_least(monkeypatch):
    for free, tokens in ((1e9, 4 * 64 + 2 * CONTEXT), (0, 4 * 64 + CONTEXT)):
        monkeypatch.setattr("dougong.serve.terminal.available_bytes", lambda device, free=free: free)
        assert Conversation(tiny_engine(), BytesConfig().build())._scheduler.blocks * 64 == tokens


def test_settings(talk):
    assert "temperature=0.5" in talk.command("/set temperature=0.5 top_p=0.9 seed=4")
    assert say(talk, "a") == (talk.take_back(), say(talk, "a"))[1]   # the same seed says the same
    assert "top_p" not in talk.command("/set temperature=0")
    for wrong in ("/set bogus=1", "/set temperature", "/set temperature=hot", "/set temperature=-1", "/set top_k=1.5",
                  "/wat", "/mode sing", "/save", "/system x"):
        before = dict(talk.sampling)
        with pytest.raises(ConfigError):
            talk.command(wrong)
        assert talk.sampling == before
    assert "seed" not in talk.command("/set seed=off")


def test_undo_reset_save(talk, tmp_path):
    say(talk, "a")
    say(talk, "b")
    assert "'b'" in talk.command("/undo") and talk.turns[0]["content"] == "a"
    talk.command(f"/save {tmp_path / 'talk.json'}")
    assert json.loads((tmp_path / "talk.json").read_text())["turns"] == talk.turns
    with pytest.raises(ConfigError, match="not written over"):
        talk.command(f"/save {tmp_path / 'talk.json'}")
    talk.command("/reset")
    assert talk.turns == [] and "nothing" in talk.command("/undo")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tiny_recipe import dougong, write_recipe, write_texts
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder / "tiny.yaml", write_texts(folder / "texts"))
    done = dougong("train", recipe, "--run", folder / "run")
    assert done.code == 0, done.err
    return folder / "run"


def start(*arguments, **more):
    return subprocess.Popen([sys.executable, "-m", "dougong", *map(str, arguments)], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_command_answers_lines(run):
    out, err = start("chat", run, "--temperature", 0, "--tokens", 8).communicate(
        "ab\n/set seed=3\n/wat\n/mode chat\nhi\n/quit\n", timeout=100)
    assert out.strip("\n").count("\n") >= 1 and "there is no /wat" in err and "seed=3" in err and "base model" in err


def test_the_server_starts_answers_drains_and_refuses_the_open_world(run):
    import httpx

    refused = start("serve", run, "--host", "0.0.0.0", "--port", 0).communicate(timeout=100)
    assert "every one of them needs a key" in refused[1]
    server = start("serve", run, "--port", 0)
    try:
        line = server.stdout.readline()
        url = line.split(" at ")[1].split()[0]
        end = time.monotonic() + 30
        while True:
            try:
                assert httpx.get(url + "/ready").status_code == 200
                break
            except httpx.ConnectError:
                assert time.monotonic() < end
                time.sleep(0.02)
        reply = httpx.post(url + "/v1/completions", json={"prompt": "ab", "max_tokens": 5}, timeout=30)
        assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 5
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=30)
        assert "Traceback" not in err and server.returncode in (0, -signal.SIGTERM)
    finally:
        server.kill()


def test_new_keys_by_the_command(tmp_path):
    from tiny_recipe import dougong
    made = dougong("serve", "--new-key", "ann", "--api-key-file", tmp_path / "k.json", "--requests-per-minute", 3)
    key = made.out.split()[0]
    assert made.code == 0 and key.startswith("dg-") and key not in (tmp_path / "k.json").read_text()
    assert json.loads((tmp_path / "k.json").read_text())["keys"][0]["requests_per_minute"] == 3
    assert dougong("serve", "--new-key", "ann").code == 2
    assert dougong("serve").code == 2
