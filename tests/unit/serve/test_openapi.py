"""The OpenAPI document, taken at its word: requests made of it and against it get answers that it names, and no 5xx."""

import pytest
from hypothesis import HealthCheck, given, settings
from live_server import live, tiny_model
from test_tools import LIST, TAGS, model

from dougong.serve.settings import ServeConfig

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def server():
    config = ServeConfig(port=0, max_tokens=4, rows=4)
    models = [tiny_model(config), model(config, "tags", TAGS), model(config, "list", LIST)]
    with live(config, models=models) as running:
        yield running
        running.idle()
        assert running.client.get("/ready").status_code == 200


@pytest.fixture(scope="module")
def api(server):
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


def explore(api, examples):
    """Requests that fit the document and requests that do not, so many of each for every route that takes a body."""
    from schemathesis import GenerationMode

    asked, wanted = 0, [schemathesis.checks.CHECKS.get_one(name) for name in (
        "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")]
    for found in api.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
            @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                      suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def answers(case):
                nonlocal asked
                asked += 1
                # What is wrong in words alone (top_p at temperature 0) no schema says, so what fits may be refused.
                case.call_and_validate(timeout=60, checks=wanted)

            answers()
    return asked


def test_every_route_answers_as_documented(api):
    assert explore(api, 12) > 100


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_route_answers_as_documented_at_length(api):
    assert explore(api, 500) > 4000
