"""`dougong serve`: a run over HTTP, for OpenAI's clients and for a browser."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    runs: Annotated[list[Path] | None, typer.Argument(help="Runs, or checkpoints inside them.")] = None,
    host: Annotated[str, typer.Option(help="Address; any but this machine's own needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="The keys that clients may use, as hashes.")] = None,
    new_key: Annotated[str | None, typer.Option(metavar="NAME", help="Add a key to --api-key-file, print it, end.")
                       ] = None,
    requests_per_minute: Annotated[float | None, typer.Option(help="With --new-key: a limit of that key.")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(help="With --new-key: tokens read and written.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="With --new-key: requests at the same time.")] = None,
    draft: Annotated[Path | None, typer.Option(help="A smaller run with the same tokenizer, which guesses ahead for "
                                               "the one run that is served.")] = None,
    speculate: Annotated[int | None, typer.Option(min=0, help="Tokens guessed ahead for few clients; 4 with --draft, "
                                                  "else 0.")] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="best, last, or a step.")] = "best",
    rows: Annotated[int, typer.Option(min=1, help="Texts written at the same time.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; more are answered 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of one text at most.")] = 4096,
    cache_tokens: Annotated[int | None, typer.Option(min=128, help="Size of the cache; else every row's "
                                                     "context, as far as free memory holds it.")
                            ] = None,
    seconds: Annotated[float, typer.Option(help="A reply ends after this time.")] = 600.0,
    allow_origin: Annotated[list[str] | None, typer.Option(help="An origin whose pages may ask; repeatable.")] = None,
    hostname: Annotated[list[str] | None, typer.Option(help="A further name of this server; repeatable.")] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and replies to standard error.")
                           ] = False,
) -> None:
    """Serve runs over HTTP: OpenAI's API under /v1, a chat page at /."""
    from dougong.core.config import from_dict
    from dougong.core.errors import ConfigError, MissingExtraError

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "fastapi", "serve", "serving a run") from None
    from dougong.serve.keys import Keys, add_key
    from dougong.serve.settings import ServeConfig

    if new_key is not None:
        if api_key_file is None:
            raise ConfigError("--new-key needs --api-key-file, the file that the key's hash is added to.")
        key = add_key(api_key_file, new_key, requests_per_minute=requests_per_minute,
                      tokens_per_minute=tokens_per_minute, concurrent=concurrent)
        print(f"{key}\nThis is the key {new_key!r}, shown this once; {api_key_file} holds its hash.")
        return
    if (requests_per_minute, tokens_per_minute, concurrent) != (None, None, None):
        raise ConfigError("limits belong to a key: give them with --new-key.")
    if not runs:
        raise ConfigError("which run? Try: dougong serve RUN")
    config = from_dict(ServeConfig, {
        "host": host, "port": port, "rows": rows, "queue": queue, "max_tokens": max_tokens,
        "cache_tokens": cache_tokens, "request_seconds": seconds, "allow_origins": tuple(allow_origin or ()),
        "hostnames": tuple(hostname or ()), "log_prompts": log_prompts,
        "speculate": speculate})
    if draft is not None and len(runs) > 1:
        raise ConfigError("--draft guesses for one run; serve the others in a process of their own.")
    if not config.is_loopback and api_key_file is None:
        raise ConfigError(f"--host {host} lets other machines in, and then every one of them needs a key.\n"
                          "Make one: dougong serve --new-key NAME --api-key-file keys.json\n"
                          "then add --api-key-file keys.json; or stay with --host 127.0.0.1.")
    keys = None if api_key_file is None else Keys.load(api_key_file)
    _run(runs, config, keys, checkpoint, draft)


def _run(runs: list[Path], config, keys, checkpoint: str, draft: Path | None) -> None:
    """Loads, listens, says where, and serves until told to stop."""
    from dougong.core.errors import ConfigError
    from dougong.generate import native
    from dougong.serve.app import create_app
    from dougong.serve.model import ServedModel
    from dougong.serve.server import Server, bind

    listener = bind(config)   # first: a port in use is said before minutes of loading
    models = [ServedModel.open(path, config, checkpoint=checkpoint, draft=draft, beside=len(runs) - 1)
              for path in runs]
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(f"two of the runs have the same name: {', '.join(names)}. Rename a directory.")
    server = Server(create_app(models, config, keys), config)
    host, bound = listener.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{bound}"
    print(f"{', '.join(names)} at {where}  (page: {where}/  API: {where}/v1)", flush=True)
    for model in models:
        print(f"cache of {model.name}: at most {model.cache_tokens:,} tokens ({model.cache_bytes / 1e9:.1f} GB; "
              "--cache-tokens)", flush=True)
    if any(model.engine.runtime.device.type == "cpu" for model in models):
        print(f"tokens are computed {native.reason()}", flush=True)
    server.run(sockets=[listener])
