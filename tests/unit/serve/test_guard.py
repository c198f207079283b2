"""Who may ask: names, origins, keys and their limits; and the headers that every answer has."""

import base64
import json
import socket
import stat
import threading
from types import SimpleNamespace

import pytest
from live_server import live, tiny_model

from dougong.core.errors import ConfigError
from dougong.serve.errors import ApiError
from dougong.serve.keys import Bucket, Keys, add_key
from dougong.serve.model import ServedModel
from dougong.serve.settings import ServeConfig

BODY = {"prompt": "a", "max_tokens": 3}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A server with keys of different limits."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = {"free": add_key(path, "free"), "slow": add_key(path, "slow", requests_per_minute=2),
            "small": add_key(path, "small", tokens_per_minute=2), "one": add_key(path, "one", concurrent=1),
            "two": add_key(path, "two", requests_per_minute=2)}
    config = ServeConfig(port=0, allow_origins=("https://friend.example",), body_bytes=2048, body_seconds=0.5,
                         header_seconds=0.6)
    with live(config, Keys.load(path)) as running:
        running.keys, running.path = keys, path
        yield running


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_every_route_but_health_needs_a_key(keyed):
    routes = {route.path for route in keyed.app.routes}
    assert {"/", "/health", "/metrics", "/v1/models", "/openapi.json", "/chat.js"} <= routes
    for path in [*routes, "/nowhere", "/v1/", "//health", "/health/", "/HEALTH", "/x/../health"]:
        for method in ("GET", "POST", "OPTIONS", "HEAD", "PUT"):
            status = keyed.client.request(method, path).status_code
            assert (status != 401) == (path == "/health" or path.endswith("/../health")), (method, path, status)
    assert keyed.client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic", "Basic !!!", "Basic d3Jvbmc=",
                                    "Digest x", "Bearer " + "x" * 5000, "Bearer \u00e9"])
def test_wrong_keys(keyed, header):
    response = keyed.client.post("/v1/completions", json=BODY, headers=[(b"authorization", header.encode("latin-1"))])
    assert response.status_code == 401 and response.headers["www-authenticate"].startswith("Basic ")
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_right_keys_as_bearer_and_as_a_browsers_password(keyed):
    key = keyed.keys["free"]
    basic = base64.b64encode(f"anyone:{key}".encode()).decode()
    for header in (f"Bearer {key}", f"bearer {key}", f"Basic {basic}"):
        assert keyed.client.post("/v1/completions", json=BODY, headers={"Authorization": header}).status_code == 200
    assert keyed.client.get("/", headers={"Authorization": f"Basic {basic}"}).status_code == 200


def test_keys_are_kept_as_salted_hashes(keyed):
    text = keyed.path.read_text()
    assert all(key not in text and key[3:] not in text for key in keyed.keys.values())
    entries = json.loads(text)["keys"]
    assert len({entry["salt"] for entry in entries}) == len({entry["sha256"] for entry in entries}) == 5
    assert stat.S_IMODE(keyed.path.stat().st_mode) == 0o600


def test_a_keys_requests_per_minute(keyed):
    answers = [keyed.client.post("/v1/completions", json=BODY, headers=bearer(keyed.keys["slow"])) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 20 <= int(answers[2].headers["retry-after"]) <= 32
    assert keyed.client.post("/v1/completions", json=BODY, headers=bearer(keyed.keys["free"])).status_code == 200


def test_a_keys_tokens_per_minute(keyed):
    body = {"prompt": "abcdefgh", "max_tokens": 11}
    first, second = (keyed.client.post("/v1/completions", json=body, headers=bearer(keyed.keys["small"]))
                     for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 429)
    assert 300 < int(second.headers["retry-after"]) < 600   # 20 used of 2: nine minutes at 2 a minute


def test_a_keys_requests_count_where_no_token_is_written(keyed):
    for path, body in (("tokenize", {"input": "a"}), ("embeddings", {"input": "a"})):
        assert keyed.client.post(f"/v1/{path}", json=body, headers=bearer(keyed.keys["two"])).status_code == 200
    for path in ("tokenize", "embeddings"):
        refused = keyed.client.post(f"/v1/{path}", json={"input": "a"}, headers=bearer(keyed.keys["two"]))
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"


def tokens_read(server):
    return server.app.state.metrics.prompt_tokens.labels("tiny")._value.get()


def test_what_is_refused_is_not_charged(tmp_path, monkeypatch):
    """Where the queue is full, and where the time was over before a token could be written."""
    key, go_on = add_key(tmp_path / "keys.json", "a", tokens_per_minute=1000), threading.Event()
    keys = Keys.load(tmp_path / "keys.json")
    with live(ServeConfig(port=0, rows=1, queue=0, request_seconds=0.2), keys) as running:
        step = running.scheduler.step
        monkeypatch.setattr(running.scheduler, "step", lambda: (go_on.wait(), step())[1])
        asked = {"prompt": "x" * 200, "max_tokens": 5}
        for body, status in (({**asked, "n": 2}, 429), (asked, 408)):
            assert running.client.post("/v1/completions", json=body, headers=bearer(key)).status_code == status
        assert keys.find(key).tokens.wait(1000) == 0 and tokens_read(running) == 0
        go_on.set()
        running.idle()


def test_a_keys_requests_at_the_same_time(keyed, monkeypatch):
    keyed.slow(monkeypatch, 0.02)
    header = f"Authorization: Bearer {keyed.keys['one']}\r\n"
    first = keyed.raw({"prompt": "a", "max_tokens": 200, "stream": True}, headers=header)
    assert first.recv(100).startswith(b"HTTP/1.1 200")
    with monkeypatch.context() as patch:     # and nothing is encoded for it either
        patch.setattr(ServedModel, "encode", lambda *a: pytest.fail("a prompt was encoded"))
        second = keyed.client.post("/v1/completions", json=BODY, headers=bearer(keyed.keys["one"]))
    assert second.status_code == 429 and second.json()["error"]["code"] == "concurrent_requests"
    first.close()
    keyed.idle()
    assert keyed.client.post("/v1/completions", json=BODY, headers=bearer(keyed.keys["one"])).status_code == 200


def test_a_bucket_fills_again(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("dougong.serve.keys.time", SimpleNamespace(monotonic=lambda: now[0]))   # no server's clock
    bucket = Bucket(60)
    assert bucket.wait(1) == 0
    bucket.take(90)
    assert bucket.wait(1) == pytest.approx(31)
    now[0] += 31
    assert bucket.wait(1) == 0
    now[0] += 1e6
    bucket.take(60)
    assert bucket.wait(1) == pytest.approx(1)   # it holds a minute's worth and no more


def test_origins(keyed, server):
    key = bearer(keyed.keys["free"])
    allowed = keyed.client.post("/v1/completions", json=BODY, headers={**key, "Origin": "https://friend.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
    assert allowed.headers["access-control-expose-headers"] == "Retry-After"
    for origin in ("https://evil.example", "null", "http://[", "https://friend.example.evil.example"):
        refused = keyed.client.post("/v1/completions", json=BODY, headers={**key, "Origin": origin})
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = keyed.client.options("/v1/completions", headers={**asked, "Origin": "https://friend.example"})
    assert preflight.status_code == 204 and preflight.headers["access-control-allow-origin"] == "https://friend.example"
    refused = keyed.client.options("/v1/completions", headers={**asked, "Origin": "https://evil.example"})
    assert refused.status_code == 403
    scripted = keyed.client.options("/v1/completions", headers={
        **asked, "Origin": "https://friend.example",    # what OpenAI's JavaScript client sends, and what none may
        "Access-Control-Request-Headers": "authorization,content-type, x-stainless-os,X-Stainless-Lang,*,b@d"})
    assert scripted.headers["access-control-allow-headers"].split(", ") == [
        "authorization", "content-type", "x-stainless-os", "x-stainless-lang"]
    own = {"Origin": server.url}
    assert server.client.post("/v1/completions", json=BODY, headers=own).status_code == 200   # the page itself
    assert server.client.get("/v1/models", headers={"Origin": "https://friend.example"}).status_code == 403


def test_a_server_without_keys_answers_to_its_own_names_only(server):
    """A page whose name was made to point at 127.0.0.1 (DNS rebinding) carries that name as Host."""
    for name in ("127.0.0.1", "localhost", "localhost:9", "[::1]:9"):
        assert server.client.get("/v1/models", headers={"Host": name}).status_code == 200
    for name in ("evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:8000"):
        assert server.client.get("/v1/models", headers={"Host": name}).status_code == 403


def test_headers_of_every_answer(server):
    for response in (server.client.get("/"), server.client.get("/nowhere"), server.client.get("/v1/models"),
                     server.post("/v1/completions", {}), server.client.get("/x", headers={"Host": "evil"})):
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY" and "server" not in response.headers
        assert "access-control-allow-origin" not in response.headers and "cache-control" in response.headers


def test_bodies_too_large_too_slow_and_heads_that_never_end(keyed):
    key = keyed.keys["free"]
    large = keyed.client.post("/v1/completions", json={"prompt": "a" * 3000}, headers=bearer(key))
    assert large.status_code == 413
    chunked = keyed.client.post("/v1/completions", content=(b"x" * 500 for _ in range(10)),
                                headers={**bearer(key), "content-type": "application/json"})
    assert chunked.status_code == 413
    lying = socket.create_connection(("127.0.0.1", keyed.port), timeout=5)
    lying.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nAuthorization: "
                  f"Bearer {key}\r\nContent-Length: 50\r\n\r\n{{".encode())
    assert b" 408 " in lying.recv(200)
    for begun in (b"", b"GET / HT", b"GET /health HTTP/1.1\r\nHost: a\r\nX: "):
        silent = socket.create_connection(("127.0.0.1", keyed.port), timeout=5)
        silent.sendall(begun)
        assert silent.recv(10) == b""   # closed by the server


def test_prompts_and_keys_are_in_no_log_and_no_metric(keyed, capfd):
    for body in ({"prompt": "SECRET-PROMPT", "max_tokens": 2}, {"prompt": "SECRET-PROMPT", "bad": 1}):
        keyed.client.post("/v1/completions", json=body, headers=bearer(keyed.keys["free"]))
    keyed.client.get("/SECRET-PATH", headers=bearer(keyed.keys["free"]))
    metrics = keyed.client.get("/metrics", headers=bearer(keyed.keys["free"])).text
    out, err = capfd.readouterr()
    for text in (out, err, metrics):
        assert "SECRET" not in text and keyed.keys["free"] not in text
    assert 'dougong_requests_total{route="/v1/completions",status="200"}' in metrics
    assert 'route="none",status="404"' in metrics and "dougong_first_token_seconds_bucket" in metrics


def test_what_a_key_file_must_be(tmp_path):
    with pytest.raises(ConfigError, match="no key file"):
        Keys.load(tmp_path / "none.json")
    for text in ("{", "[]", '{"keys": [{"name": "a"}]}', '{"keys": 3}',
                 '{"keys": [{"name": "a", "salt": "zz", "sha256": "00"}]}',
                 '{"keys": [{"name": "a", "salt": "00", "sha256": "00"}]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.json"):
            Keys.load(tmp_path / "bad.json")
    (tmp_path / "empty.json").write_text('{"keys": []}')
    with pytest.raises(ConfigError, match="holds no key"):
        Keys.load(tmp_path / "empty.json")
    add_key(tmp_path / "k.json", "a")
    with pytest.raises(ConfigError, match="already"):
        add_key(tmp_path / "k.json", "a")


def test_limits_of_a_client_count_what_runs():
    from dougong.serve.keys import Client
    client = Client("a", concurrent=1)
    client.enter()
    with pytest.raises(ApiError):
        client.enter()
    client.leave(5)
    client.enter()


def test_a_wildcard_origin_is_refused():
    for origin in ("*", "friend.example", "https://a.example/path"):
        with pytest.raises(ConfigError, match="origin"):
            ServeConfig(allow_origins=(origin,))


def test_the_log_holds_prompts_only_if_asked(capfd):
    config = ServeConfig(port=0, log_prompts=True)
    with live(config, models=[tiny_model(config)]) as running:
        running.post("/v1/completions", {"prompt": "REMEMBER", "max_tokens": 1})
    assert "REMEMBER" in capfd.readouterr().err
