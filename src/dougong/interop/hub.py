"""Where a named model lies: a folder here, or one that a hub's own client fetches because its name was given.

`hf:org/name` and `ms:org/name` (ModelScope), each with an optional `@revision`. Mirrors are the clients' own business
(HF_ENDPOINT, MODELSCOPE_DOMAIN), and so is what they keep. Nothing is fetched that was not named so.
"""

from collections.abc import Callable
from pathlib import Path

from dougong.core.errors import CheckpointError, ConfigError, MissingExtraError

_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]
"""pickled weights are not even fetched"""
HUBS = {"hf": "Hugging Face", "ms": "ModelScope"}


def is_hub_name(name: str) -> bool:
    """Whether this names a model on a hub, not a path here."""
    return ":" in name and name.partition(":")[0] in HUBS


def model_name(name: str) -> str:
    """The last part of a name on a hub, such as `Qwen3-0.6B`."""
    return name.partition("@")[0].rpartition("/")[2]


def local_directory(name: str) -> Path:
    """The folder of a model, fetched first where its name has a hub's prefix.

    Raises ConfigError for a name of the wrong form, CheckpointError where there is nothing or the hub cannot be
    reached.
    """
    if not is_hub_name(name):
        return _folder(name)
    hub, _, rest = name.partition(":")
    model, _, revision = rest.partition("@")
    if model.count("/") != 1 or not all(model.split("/")):
        raise ConfigError(f"{name!r} is no model's name: write {hub}:owner/model, or {hub}:owner/model@revision.")
    return Path({"hf": _from_hugging_face, "ms": _from_model_scope}[hub](name, model, revision or None))


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ConfigError(f"{path} is a file. Give the directory that holds config.json, the weights and the "
                          "tokenizer.")
    hint = f" To fetch it, name its hub: hf:{name} or ms:{name}." if name.count("/") == 1 else ""
    raise CheckpointError(f"no model at {path}.{hint}")


def _from_hugging_face(name: str, model: str, revision: str | None) -> str:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hf", f"Fetching {name}") from None
    return _fetch(name, "HF_ENDPOINT", lambda: snapshot_download(model, revision=revision, allow_patterns=_WANTED))


def _from_model_scope(name: str, model: str, revision: str | None) -> str:
    try:
        from modelscope import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtraError("modelscope", "modelscope", f"Fetching {name}") from None
    return _fetch(name, "MODELSCOPE_DOMAIN",
                  lambda: snapshot_download(model, revision=revision, allow_file_pattern=_WANTED))


def _fetch(name: str, mirror: str, download: Callable[[], str]) -> str:
    hub = HUBS[name.partition(":")[0]]
    try:
        return download()
    except Exception as error:   # the clients raise their HTTP library's errors, several of them for one cause
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} could not be fetched from {hub}: {reason[:300]}\nWithout a network, copy its folder here and name "
            f"that; for a mirror set {mirror}; for a private model log in with the hub's own tool.") from None
