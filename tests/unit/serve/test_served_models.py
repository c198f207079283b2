"""Models that are broken beside one that is not, and a model with a draft."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from live_server import live, tiny_engine, tiny_model, tiny_net

from dougong.core.errors import CheckpointError, ConfigError
from dougong.core.run import RunDirectory
from dougong.data.tokenizer import BytesConfig
from dougong.recipes.open_run import OpenRun
from dougong.runtime.device import Runtime
from dougong.serve.model import ServedModel
from dougong.serve.settings import ServeConfig

TALK = [{"role": "user", "content": "hi"}]
ASKED = {"prompt": "a b a b a b", "max_tokens": 24, "temperature": 0}
LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


def broken_engine():
    engine = tiny_engine()
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.fill_(torch.nan)
    return engine


@pytest.fixture(scope="module")
def server():
    config = ServeConfig(port=0)
    speculating = ServeConfig(port=0, speculate=3)

    def served(name, engine, config=config, **more):
        return ServedModel(name, engine, BytesConfig().build(), config, **more)

    models = [tiny_model(config), served("nan", broken_engine()), served("loops", tiny_engine(), template=LOOP),
              served("reaches", tiny_engine(), template="{{ messages.__init__.__globals__ }}"),
              served("drafted", tiny_engine(), draft=tiny_engine()),
              served("other", tiny_engine(), draft=tiny_engine(2)), served("repeats", tiny_engine(), speculating)]
    with live(config, models=models) as running:
        yield running


def text(server, name, **more):
    response = server.post("/v1/completions", {"model": name, **ASKED, **more})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


@pytest.mark.parametrize("name, path, status, says", [
    ("nan", "completions", 500, "not finite (NaN or infinity)"), ("nan", "embeddings", 500, "not finite"),
    ("loops", "chat/completions", 400, "the chat template did not end within 1 s"),
    ("reaches", "chat/completions", 400, "reaches outside its sandbox")])
def test_a_broken_model_is_told_and_the_others_are_served(server, name, path, status, says):
    before = text(server, "tiny")
    body = {"completions": ASKED, "embeddings": {"input": "a"}, "chat/completions": {"messages": TALK}}[path]
    response = server.post(f"/v1/{path}", {"model": name, **body})
    assert response.status_code == status and says in response.json()["error"]["message"]
    assert text(server, "tiny") == before
    assert server.client.get("/ready").status_code == 200


@pytest.mark.parametrize("name", ["drafted", "other", "repeats"])
@pytest.mark.parametrize("more", [{}, {"stop": ["q", "zz"]}, {"repetition_penalty": 1.3}, {"logit_bias": {"97": 9}}])
def test_a_draft_changes_no_greedy_text(server, name, more):
    assert text(server, name, **more) == text(server, "tiny", **more)


def test_a_draft_keeps_to_a_schema(server):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {
        "type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "minItems": 3, "maxItems": 3}}}
    for name in ("drafted", "other"):
        reply = server.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 90, "seed": 2,
                                                "response_format": form}).json()
        assert len(json.loads(reply["choices"][0]["text"])) == 3


def opened(tmp_path, tokenizer, name):
    return OpenRun(RunDirectory(tmp_path / name), None, Runtime(), tiny_net(), tokenizer, 1, "raw", {}, [])


def test_a_draft_with_another_tokenizer_is_refused(tmp_path):
    one, same = (opened(tmp_path, BytesConfig().build(), name) for name in ("one", "same"))
    assert same.drafting_for(one).vocab_size == 257
    other = opened(tmp_path, SimpleNamespace(fingerprint="f" * 64), "other")
    with pytest.raises(ConfigError, match=r"other cannot draft for .*one: their tokenizers differ \(ffffffffffff, "):
        other.drafting_for(one)
    with pytest.raises(ConfigError, match="--draft has no effect with --speculate 0"):
        ServedModel("m", tiny_engine(), BytesConfig().build(), ServeConfig(speculate=0), draft=tiny_engine())


def test_a_tokenizer_that_does_not_match_the_embedding_names_both(tmp_path, monkeypatch):
    run = opened(tmp_path, SimpleNamespace(vocab_size=300, fingerprint="f"), "run")
    monkeypatch.setattr("dougong.recipes.open_run.open_run", lambda path, **_: run)
    with pytest.raises(CheckpointError, match=r"run: the tokenizer \(.*run\) has 300 entries.*vocab_size\) 257 rows"):
        ServedModel.open(tmp_path / "run", ServeConfig())


TOKEN_BYTES = 2 * 2 * 32 * 4     # of the tiny model: keys and values, two layers, its width, float32


@pytest.mark.parametrize("free, tokens", [(1e9, 16 * 384), (1e6, 768), (0, 384)])
def test_the_default_cache_is_what_free_memory_holds(monkeypatch, free, tokens):
    """Every row's context; less where memory is short; never less than one."""
    monkeypatch.setattr("dougong.serve.model.available_bytes", lambda device: free)
    model = tiny_model(ServeConfig(port=0))
    assert (model.cache_tokens, model.cache_bytes) == (tokens, tokens * TOKEN_BYTES)
    assert model._scheduler.blocks * 64 == tokens


def test_a_draft_shares_the_memory(monkeypatch):
    monkeypatch.setattr("dougong.serve.model.available_bytes", lambda device: 2e6)
    model = ServedModel("m", tiny_engine(), BytesConfig().build(), ServeConfig(port=0), draft=tiny_engine(1))
    assert model.cache_tokens == int(0.4 * 2e6 / (2 * TOKEN_BYTES)) // 64 * 64
    assert model.cache_bytes == model.cache_tokens * 2 * TOKEN_BYTES


def test_a_cache_that_was_asked_for_is_made(monkeypatch):
    monkeypatch.setattr("dougong.serve.model.available_bytes", lambda device: 0)
    assert tiny_model(ServeConfig(port=0, cache_tokens=6400)).cache_tokens == 6400


def test_models_that_are_served_together_share_the_memory(monkeypatch):
    monkeypatch.setattr("dougong.serve.model.available_bytes", lambda device: 3e6)
    alone, beside = (ServedModel("m", tiny_engine(), BytesConfig().build(), ServeConfig(), beside=beside).cache_tokens
                     for beside in (0, 2))
    assert (alone, beside) == (2304, 768)


def test_a_server_says_how_large_its_cache_may_become(monkeypatch, capsys):
    from dougong.cli.serve import _run
    monkeypatch.setattr("dougong.serve.model.available_bytes", lambda device: 1e6)
    monkeypatch.setattr(ServedModel, "open", lambda path, config, **more: tiny_model(config))
    monkeypatch.setattr("dougong.serve.server.Server.run", lambda server, sockets: sockets[0].close())
    _run([Path("tiny")], ServeConfig(port=0), None, "best", None)
    assert "cache of tiny: at most 768 tokens (0.0 GB" in capsys.readouterr().out


def test_whoever_loads_a_model_leaves_the_cores_to_its_runner(monkeypatch):
    """What `end_team` does is tested in tests/unit/runtime."""
    ended = []
    monkeypatch.setattr("dougong.serve.model.end_team", lambda: ended.append(True))
    tiny_model(ServeConfig(port=0))
    assert ended == [True]
