"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error",
          415: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "overloaded_error"}
_SHOWN = 200   # characters of a message's part that came from the client


class ApiError(Exception):
    """An answer that is not the one asked for. `param` names the field, `retry_after` (s) when to come back."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": _TYPES.get(self.status, "invalid_request_error"),
                          "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after + 0.5)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="dougong: any name, an API key as password", charset="UTF-8"'
        return JSONResponse(self.body(), self.status, headers)


def of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, its field named."""
    problem = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in problem["loc"]) or None
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"the field {_short(param)!r} is not known here, and is not ignored. Leave it out.",
                        param=_short(param), code="unknown_field")
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON that can be read: {_short(problem['msg'])}.", code="invalid_json")
    came = problem.get("input")
    shown = "" if isinstance(came, dict | list) or problem["type"] == "missing" else f"; {_short(repr(came))} came"
    return ApiError(400, f"{_short(param) or 'the body'}: {_short(problem['msg'])}{shown}.", param=_short(param),
                    code="invalid_value")


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= _SHOWN else text[:_SHOWN] + "…"
