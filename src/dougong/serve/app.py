"""The routes: OpenAI's, health, metrics, and the page."""

import asyncio
import base64
import hashlib
import json
import math
import struct
import traceback
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from dougong import __version__
from dougong.core.errors import CheckpointError, DougongError
from dougong.serve.answer import Answer, encoded, texts_in
from dougong.serve.bodies import Body, ChatBody, CompletionBody, EmbeddingBody, TokenizeBody, Writing, parse
from dougong.serve.errors import ApiError
from dougong.serve.guard import Guard, read_body
from dougong.serve.keys import Client, Keys
from dougong.serve.metrics import Metrics
from dougong.serve.model import ServedModel
from dougong.serve.settings import ServeConfig
from dougong.serve.stream import ClientLeft, EventStream, unless_left

_WEB = Path(__file__).parent / "web"
_KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
          ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_EMBEDDINGS = 64   # texts in one request
T = TypeVar("T", bound=Body)
_BODIES: dict[str, type[Body]] = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody,
                                  "/v1/tokenize": TokenizeBody, "/v1/embeddings": EmbeddingBody}


def create_app(models: Sequence[ServedModel], config: ServeConfig | None = None, keys: Keys | None = None) -> FastAPI:
    """The server of some models. `app.state.draining` refuses new work while running replies end."""
    config = config or ServeConfig()
    metrics = Metrics()
    named = {model.name: model for model in models}
    if len(named) < len(models):
        raise ValueError("two models of one name")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        for model in models:
            model.start(metrics)
        app.state.ready = True
        yield
        app.state.ready = False
        for model in models:
            model.runner.close()

    app = FastAPI(title="dougong", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
                  redirect_slashes=False)
    app.state.ready, app.state.draining, app.state.metrics, app.state.models = False, False, metrics, named
    app.openapi = lambda: _describe(app)   # type: ignore[method-assign]
    _add_errors(app)
    _add_status(app, metrics, named)
    _add_writing(app, config, metrics, named)
    _add_ids(app, config, named)
    _add_page(app)
    app.add_middleware(Guard, config=config, keys=keys, metrics=metrics)
    return app


def _add_errors(app: FastAPI) -> None:
    async def asked_wrong(_request: Request, error: Any) -> Response:
        if isinstance(error, ApiError):
            return error.response()
        if isinstance(error, HTTPException):
            said = {404: "there is no such path here", 405: "this path does not take that method"}
            return ApiError(error.status_code, said.get(error.status_code, str(error.detail))).response()
        if isinstance(error, ClientLeft):
            app.state.metrics.left.inc()
            return Response(status_code=499)   # nobody reads it; it is counted under this number
        status = 500 if isinstance(error, CheckpointError) else 400
        return ApiError(status, str(error), code="model_error" if status == 500 else "invalid_value").response()

    async def broke(_request: Request, error: Exception) -> Response:
        traceback.print_exception(error)
        return ApiError(500, "the server made a mistake; its log says which.", code="internal_error").response()

    for kind in (ApiError, HTTPException, ClientLeft, DougongError):
        app.add_exception_handler(kind, asked_wrong)
    app.add_exception_handler(Exception, broke)


def _add_status(app: FastAPI, metrics: Metrics, models: dict[str, ServedModel]) -> None:
    @app.get("/health", summary="The process answers. Needs no key.")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="The models are loaded and write; 503 while starting, draining or broken.",
             responses={503: {"description": "Starting, draining or broken"}})
    async def ready() -> Response:
        unwell = [name for name, model in models.items() if app.state.ready and not model.runner.healthy]
        status = ("starting" if not app.state.ready else "draining" if app.state.draining
                  else "broken" if unwell else "ready")
        return JSONResponse({"status": status, "models": list(models), "unwell": unwell},
                            200 if status == "ready" else 503)

    @app.get("/metrics", summary="Counters in Prometheus' words.", response_class=PlainTextResponse)
    async def told() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/v1/models", summary="The models, each with its context, template and size.")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [model.describe() for model in models.values()]}

    @app.get("/v1/models/{name:path}", summary="One model.",
             responses={404: {"description": "There is no such model"}})
    async def one(name: str) -> dict[str, Any]:
        return _model(models, name).describe()


def _add_writing(app: FastAPI, config: ServeConfig, metrics: Metrics, models: dict[str, ServedModel]) -> None:
    async def write(request: Request, kind: type[CompletionBody] | type[ChatBody]) -> Response:
        body = await _asked(kind, request, config)
        client: Client = request.scope["state"]["client"]
        answer = Answer(body, _model(models, body.model), client, config, metrics)
        await answer.prepare()
        if not body.stream:
            return JSONResponse(await unless_left(request.receive, answer.whole()))
        pieces = await unless_left(request.receive, answer.begun())
        return EventStream(answer.events(pieces), pieces, config.send_seconds, metrics.left.inc)

    @app.post("/v1/completions", summary="Continue texts.")
    async def completions(request: Request) -> Response:
        return await write(request, CompletionBody)

    @app.post("/v1/chat/completions", summary="Answer a conversation.")
    async def chat(request: Request) -> Response:
        return await write(request, ChatBody)


def _add_ids(app: FastAPI, config: ServeConfig, models: dict[str, ServedModel]) -> None:
    @app.post("/v1/tokenize", summary="The tokens of a text or a conversation.")
    async def tokenize(request: Request) -> Response:
        body = await _asked(TokenizeBody, request, config)
        model, client = _model(models, body.model), request.scope["state"]["client"]
        if (body.input is None) == (body.messages is None):
            raise ApiError(400, "send either input (a text) or messages (a conversation).", param="input",
                           code="invalid_value")
        client.enter()
        try:
            if body.messages is not None:
                ids = await model.encode_chat(body.messages)
            else:
                ids = await model.plain_ids(body.input or "")
            return Response(await asyncio.to_thread(_spelled, ids, model), media_type="application/json")
        finally:
            client.leave(0)      # the model has read nothing

    @app.post("/v1/embeddings", summary="Vectors of texts.")
    async def embeddings(request: Request) -> Response:
        body = await _asked(EmbeddingBody, request, config)
        model, client = _model(models, body.model), request.scope["state"]["client"]
        texts = texts_in(body.input)
        if len(texts) > _EMBEDDINGS:
            raise ApiError(400, f"{len(texts)} texts came; at most {_EMBEDDINGS} in one request.", param="input",
                           code="too_many_inputs")
        client.enter()
        count = 0
        try:
            prompts = await encoded(texts, model)
            for ids in prompts:
                _check_embeddable(ids, model)
            with model.runner.places():
                count = sum(map(len, prompts))
                vectors = await unless_left(request.receive, _embed(model, prompts))
        finally:
            client.leave(count)
        told = [_spell_vector(vector, body.encoding_format) for vector in vectors]
        return JSONResponse({"object": "list", "model": model.name, "usage": {
            "prompt_tokens": count, "total_tokens": count}, "data": [
            {"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(told)]})


async def _asked(kind: type[T], request: Request, config: ServeConfig) -> T:
    """The body of a request for work. Raises ApiError, 503 while the server drains."""
    body = parse(kind, await read_body(request, config))
    if request.app.state.draining:
        raise ApiError(503, "the server is stopping and takes no new work.", code="draining", retry_after=5)
    return body


def _spelled(ids: list[int], model: ServedModel) -> bytes:
    """The answer of /v1/tokenize; its lists joined here, as json lets no other thread run while it writes a list."""
    texts = {id: json.dumps(model.spell(id)[0], ensure_ascii=False) for id in set(ids)}
    told = json.dumps({"object": "tokens", "model": model.name, "count": len(ids), "context": model.context})
    lists = (f'"{name}": [{", ".join(items)}]' for name, items in (
        ("tokens", [str(id) for id in ids]), ("texts", [texts[id] for id in ids])))
    return f"{told[:-1]}, {', '.join(lists)}}}".encode()


def _check_embeddable(ids: list[int], model: ServedModel) -> None:
    if len(ids) > model.context:
        raise ApiError(400, f"a text has {len(ids):,} tokens; the model reads at most {model.context:,}.",
                       param="input", code="context_length_exceeded")
    if max(ids) >= model.tokenizer.vocab_size:
        raise ApiError(400, f"the token {max(ids)} is not below {model.tokenizer.vocab_size}.", param="input",
                       code="invalid_value")


async def _embed(model: ServedModel, prompts: list[list[int]]) -> list[list[float]]:
    """One text between two steps, so that those who write wait for one text at most."""
    return [await model.runner.call(lambda ids=ids: model.embed(ids)) for ids in prompts]


def _spell_vector(vector: list[float], form: str) -> list[float] | str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else vector


def _add_page(app: FastAPI) -> None:
    """The files of the page: read once, so that nothing a client names ever becomes a path."""
    files = {"/" + path.relative_to(_WEB).as_posix(): path for path in _WEB.rglob("*") if path.suffix in _KINDS}
    files["/"] = files["/index.html"]

    def add(where: str, path: Path) -> None:
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'

        @app.get(where, include_in_schema=False)
        async def page(request: Request) -> Response:
            headers = {"ETag": tag, "Cache-Control": "no-cache"}
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)
            return Response(content, media_type=_KINDS[path.suffix], headers=headers)

    for where, path in files.items():
        add(where, path)


def _model(models: dict[str, ServedModel], name: str | None) -> ServedModel:
    if name is None and len(models) == 1:
        return next(iter(models.values()))
    if name not in models:
        came = "no model was named" if name is None else f"there is no model {name!r}"
        raise ApiError(400 if name is None else 404, f"{came}. There are: {', '.join(models)}.", param="model",
                       code="model_not_found")
    return models[name]


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document with each body's schema, made when somebody asks for it."""
    for route in app.routes:
        if isinstance(route, APIRoute) and (kind := _BODIES.get(route.path)):
            route.openapi_extra = _takes(kind)
    return FastAPI.openapi(app)


def _takes(kind: type[Body]) -> dict[str, Any]:
    """A route's body in the OpenAPI document, and the answers it may give."""
    told = {"application/json": {}, **({"text/event-stream": {}} if issubclass(kind, Writing) else {})}
    return {"requestBody": {"required": True, "content": {"application/json": {
        "schema": _inlined(kind.model_json_schema())}}}, "responses": {
        "200": {"description": "The answer", "content": told},
        **{str(status): {"description": said} for status, said in (
            (400, "The body is wrong; the message names the field"), (401, "The API key is missing or unknown"),
            (403, "Not this name or origin"), (404, "There is no such model"), (408, "Too slow"),
            (413, "The body is too large"), (415, "The body is no JSON"), (429, "Too much at once; see Retry-After"),
            (500, "The model failed"), (503, "The server is stopping"))}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its definitions in their places, as OpenAPI looks for them elsewhere."""
    definitions = schema.pop("$defs", {})

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return walk(definitions[node["$ref"].rpartition("/")[2]])
            return {key: walk(value) for key, value in node.items() if not _endless(value)}
        return [walk(value) for value in node] if isinstance(node, list) else node

    return walk(schema)


def _endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
