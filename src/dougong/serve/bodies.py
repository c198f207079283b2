"""What a request may say: every field typed and bounded; what cannot be done is refused by its name."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from dougong.serve.errors import ApiError, of_validation
from dougong.serve.tool_bodies import NamedTool, Tool, ToolCall

_LARGEST = 2**63 - 1
_TEXTS = 1024
_LEAST_TEMPERATURE = 2.0**-126    # float32's smallest normal number: what is divided by less may become infinite


def _few(value: Any) -> Any:
    """Before each text is looked at; a long list of ids is one text."""
    if isinstance(value, list) and len(value) > _TEXTS and not isinstance(value[0], int):
        raise ValueError(f"{len(value):,} texts came; at most {_TEXTS:,} in one request")
    return value


_Ids = Annotated[list[Annotated[int, Field(ge=0, le=_LARGEST)]], Field(min_length=1, fail_fast=True)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]

UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "it is the older name of tools"),
    "function_call": (("none", "auto"), "it is the older name of tool_choice"),
    "best_of": ((1,), "ask for n choices with logprobs and choose yourself"),
    "echo": ((False,), "the prompt is not repeated; POST /v1/tokenize gives its tokens"),
    "suffix": (("",), "these models write forwards only"),
    "modalities": ((["text"],), "these models write text only"),
    "audio": ((), "these models write text only"),
    "prediction": ((), "there is no predicted output"),
    "reasoning_effort": ((), "these models have no reasoning levels"),
    "verbosity": ((), "these models have no levels of verbosity"),
    "store": ((False,), "nothing is stored"),
    "metadata": (({},), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "web_search_options": ((), "the server asks no other host"),
    "prompt_cache_key": ((), "prefixes are shared by their content"),
    "safety_identifier": ((), "nothing is stored"),
    "dimensions": ((), "embeddings have the model's width"),
}
"""Fields of OpenAI's API that are refused, but for values that ask for nothing; and why."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    model: str | None = Field(default=None, max_length=256)
    """one of /v1/models; may be left out where there is one only"""
    user: str | None = Field(default=None, max_length=256)
    """accepted for compatibility; neither used nor logged"""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    include_usage: bool = False
    """a last chunk holds usage and timings"""
    include_obfuscation: Literal[False] = False


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    type: Literal["text", "json_object", "json_schema", "regex", "choice", "grammar"] = "text"
    json_schema: dict[str, Any] | None = None
    regex: str | None = Field(default=None, max_length=4096)
    choice: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = Field(default=None, min_length=1,
                                                                                   max_length=1024)
    grammar: str | None = Field(default=None, max_length=65536)


class Writing(Body):
    """What completions and chat have in common. Absent and null mean the default."""

    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, ge=0, le=1)
    """0 takes the likeliest token, as temperature 0 does"""
    top_k: int | None = Field(default=None, ge=1, le=_LARGEST)
    """an addition to OpenAI's fields, as min_p, repetition_penalty, truncation"""
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(max_length=20)], Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=1024)
    n: int = Field(default=1, ge=1, le=1024)
    max_tokens: int | None = Field(default=None, ge=1, le=_LARGEST)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] = []
    seed: int | None = Field(default=None, ge=-2**63, le=_LARGEST)
    """the same seed and request give the same text; the reply names the seed used where none came"""
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    truncation: Literal["disabled", "auto"] = "disabled"
    """auto: of a prompt that leaves no room for the answer, the end is kept"""

    @model_validator(mode="after")
    def _take_the_likeliest(self) -> "Writing":
        """Where nothing else is left, at temperature 0."""
        if self.top_p == 0 or self.temperature < _LEAST_TEMPERATURE:
            self.temperature, self.top_p = 0.0, self.top_p or 1.0
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionBody(Writing):
    """`POST /v1/completions`: continue a text, or token ids."""

    prompt: Annotated[str | _Ids | Annotated[list[str], Field(min_length=1, fail_fast=True)]
                      | Annotated[list[_Ids], Field(min_length=1, fail_fast=True)], BeforeValidator(_few)]
    logprobs: int | None = Field(default=None, ge=0, le=20)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    """may be left out where there are tool_calls"""
    tool_calls: list[ToolCall] | None = Field(default=None, min_length=1, max_length=128)
    """of an assistant's turn: what it called"""
    tool_call_id: str | None = Field(default=None, max_length=256)
    """of a tool's turn: the call that it answers"""
    name: str | None = Field(default=None, max_length=256)
    """who speaks, for templates that tell; of a tool's turn its call says it"""

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Message":
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a tool's message, and no other, names a tool_call_id")
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        if self.content is None and self.tool_calls is None:
            raise ValueError("a message needs content")
        return self

    def plain(self, *, as_text: bool = False) -> dict[str, Any]:
        """As templates read it: text parts joined, `developer` by its older name; arguments `as_text` or objects."""
        content = self.content or ""
        told = {"role": "system" if self.role == "developer" else self.role,
                "content": content if isinstance(content, str) else "".join(part.text for part in content)}
        calls = {} if self.tool_calls is None else {"tool_calls": [call.plain(as_text) for call in self.tool_calls]}
        names = {"tool_call_id": self.tool_call_id, "name": self.name}
        return {**told, **calls, **{field: held for field, held in names.items() if held is not None}}


class ChatBody(Writing):
    """`POST /v1/chat/completions`: answer a conversation."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_LARGEST)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] = Field(default=[], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """which calls a reply makes: none, those it likes (the default where there are tools), at least one, or this"""
    parallel_tool_calls: bool = True
    """whether a reply may make several calls"""


class TokenizeBody(Body):
    """`POST /v1/tokenize`: the ids of a text, or of a conversation as the model reads it."""

    input: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=4096)


class EmbeddingBody(Body):
    """`POST /v1/embeddings`: the mean of the last hidden states, scaled to length 1."""

    input: Annotated[Annotated[str, Field(min_length=1)] | _Ids
                     | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, fail_fast=True)]
                     | Annotated[list[_Ids], Field(min_length=1, fail_fast=True)], BeforeValidator(_few)]
    encoding_format: Literal["float", "base64"] = "float"


T = TypeVar("T", bound=Body)


def parse(kind: type[T], raw: bytes) -> T:
    """The body as `kind`. Raises ApiError 400 that names what is wrong: never anything else, whatever comes."""
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON that can be read: {str(error)[:200]}.",
                       code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is no JSON object.", code="invalid_json")
    value = {name: held for name, held in value.items() if held is not None and not _idle(name, held)}
    if isinstance(value.get("messages"), list):
        value["messages"] = [{name: held for name, held in message.items() if held is not None}
                             if isinstance(message, dict) else message for message in value["messages"]]
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise of_validation(error) from None


def _idle(name: str, held: Any) -> bool:
    """Whether an unsupported field asks for nothing. Raises ApiError where it asks for something."""
    if name not in UNSUPPORTED:
        return False
    neutral, reason = UNSUPPORTED[name]
    if any(type(held) is type(value) and held == value for value in neutral):
        return True
    raise ApiError(400, f"{name!r} is not supported: {reason}. Leave it out.", param=name, code="unsupported_field")
