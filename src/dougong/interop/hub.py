"""Where a named model lies: a folder here, or one that a hub's own client fetches because its name was given.

`hf:org/name` and `ms:org/name` (ModelScope), each with an optional `@revision`. Mirrors are the clients' own business
(HF_ENDPOINT, MODELSCOPE_DOMAIN), and so is what they keep. Nothing is fetched that was not named so, and no weights
before config.json was found to be of a model that is known here.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dougong.core.errors import CheckpointError, ConfigError, MissingExtraError
from dougong.interop.import_hf import family_of, read_config

_SETTINGS = ("*.json", "*.jinja")
"""config, tokenizer, chat template, and the index of weights in several files"""
_WEIGHTS = ("*.safetensors",)
"""pickled ones are not even fetched"""
_COMMIT = re.compile(r"[0-9a-f]{40}")
HUBS = {"hf": "Hugging Face", "ms": "ModelScope"}
_LOG_IN = {"hf": " (hf auth login, or HF_TOKEN)", "ms": ""}


def is_hub_name(name: str) -> bool:
    """Whether this names a model on a hub, not a path here."""
    return ":" in name and name.partition(":")[0] in HUBS


def model_name(name: str) -> str:
    """The last part of a name on a hub, such as `Qwen3-0.6B`."""
    return name.partition("@")[0].rpartition("/")[2]


def at_revision(name: str, directory: Path) -> str:
    """A hub's name with the commit of the folder that was fetched by it, so that what is fetched later is of the same.

    As it is where it names a path, or a hub whose client does not name its folders so (ModelScope's).
    """
    known = is_hub_name(name) and directory.parent.name == "snapshots" and _COMMIT.fullmatch(directory.name)
    return f"{name.partition('@')[0]}@{directory.name}" if known else name


def local_directory(name: str, *, weights: bool = True) -> Path:
    """The folder of a model, fetched first where its name has a hub's prefix: config and tokenizer, then, of the same
    revision, the weights, unless those are not wanted.

    Raises ConfigError for a name of the wrong form and, before any weights are fetched, for a model that is not known
    here; CheckpointError where there is nothing or the hub cannot be reached.
    """
    if not is_hub_name(name):
        return _folder(name)
    hub, _, rest = name.partition(":")
    model, _, revision = rest.partition("@")
    if model.count("/") != 1 or not all(model.split("/")):
        raise ConfigError(f"{name!r} is no model's name: write {hub}:owner/model, or {hub}:owner/model@revision.")
    fetch = {"hf": _from_hugging_face, "ms": _from_model_scope}[hub]
    directory = Path(fetch(name, model, revision or None, _SETTINGS))
    if not weights or not _is_model(name, directory):
        return directory
    revision = at_revision(name, directory).partition("@")[2]
    return Path(fetch(name, model, revision or None, (*_SETTINGS, *_WEIGHTS)))


def _is_model(name: str, directory: Path) -> bool:
    """Whether there are weights to be fetched: of an adapter, or of a model, whose config is looked at first. What else
    it is, is said by whoever reads the folder."""
    if (directory / "config.json").is_file():
        family_of(Path(name), read_config(directory))
        return True
    return (directory / "adapter_config.json").is_file()


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ConfigError(f"{path} is a file. Give the directory that holds config.json, the weights and the "
                          "tokenizer.")
    hint = f" To fetch it, name its hub: hf:{name} or ms:{name}." if name.count("/") == 1 else ""
    raise CheckpointError(f"no model at {path}.{hint}")


def _from_hugging_face(name: str, model: str, revision: str | None, wanted: Sequence[str]) -> str:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hf", f"Fetching {name}") from None
    return _fetch(name, "HF_ENDPOINT", lambda: snapshot_download(model, revision=revision, allow_patterns=[*wanted]))


def _from_model_scope(name: str, model: str, revision: str | None, wanted: Sequence[str]) -> str:
    try:
        from modelscope import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtraError("modelscope", "modelscope", f"Fetching {name}") from None
    return _fetch(name, "MODELSCOPE_DOMAIN",
                  lambda: snapshot_download(model, revision=revision, allow_file_pattern=[*wanted]))


def _fetch(name: str, mirror: str, download: Callable[[], str]) -> str:
    hub = HUBS[name.partition(":")[0]]
    try:
        return download()
    except Exception as error:   # the clients raise their HTTP library's errors, several of them for one cause
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} could not be fetched from {hub}: {reason[:300]}\nWithout a network, copy its folder here and name "
            f"that; for a mirror set {mirror}; for a private or gated model log in with the hub's own tool"
            f"{_LOG_IN[name.partition(':')[0]]}.") from None
