"""What a request may say about tools: functions, which of them to call, and the calls of earlier turns."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dougong.serve.errors import ApiError

_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
_Id = Annotated[str, Field(min_length=1, max_length=256)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class Function(_Part):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """a JSON schema of an object; none: the function takes no arguments"""
    strict: bool | None = None
    """arguments are always held to the schema"""


class Tool(_Part):
    type: Literal["function"]
    function: Function


class _Named(_Part):
    name: _Name


class NamedTool(_Part):
    type: Literal["function"]
    function: _Named


class CalledFunction(_Part):
    name: _Name
    arguments: str


class ToolCall(_Part):
    """A call of an earlier turn, as a reply held it."""

    id: _Id
    type: Literal["function"]
    function: CalledFunction

    def plain(self, as_text: bool) -> dict[str, Any]:
        """As templates read it. Raises ApiError where the arguments are no JSON object."""
        try:
            given = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise ApiError(400, f"the arguments of the call {self.id!r} are no JSON object.", param="messages",
                           code="invalid_value")
        return {"id": self.id, "type": "function", "function": {
            "name": self.function.name, "arguments": self.function.arguments if as_text else given}}
