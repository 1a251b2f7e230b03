"""`jina-jax serve`: an embedding server that clients of OpenAI, Jina, Cohere and
text-embeddings-inference use by changing a URL."""

import os
from pathlib import Path
from typing import Any, Literal

import click

from ..bulk.run import load_on_this_host
from ..checkpoints.sources import find_model
from ..command import Command, model_options
from ..errors import how_to_install


@click.command(cls=Command, short_help="Serve embeddings to clients of OpenAI, Jina, Cohere and TEI.")
@click.option("--model", required=True, type=click.Path(), help="Directory or hub id, in any supported layout.")
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 = all.")
@click.option("--port", type=int, default=8080, show_default=True, help="0 = any that is free.")
@click.option("--served-model-name", "names", multiple=True, help="Name to be listed under; repeatable.  [default: MODEL]")
@click.option("--default-task", help="Task of requests that name none.  [default: the base model]")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="Keys, one a line; also JINA_JAX_API_KEYS=A,B.")
@click.option("--max-body", type=int, default=32 * 2**20, show_default=True, help="Bytes of a request.")
@click.option("--max-texts", type=int, default=2048, show_default=True, help="Texts of a request.")
@click.option("--max-queued-tokens", type=int, default=300_000, show_default=True, help="Beyond it requests get 429.")
@click.option("--max-batch-tokens", type=int, help="Slots computed at once on a device.  [default: 4096; on CPU 1024]")
@click.option("--deadline", type=float, default=30, show_default=True, help="Seconds in which a request is answered.")
@click.option("--drain", type=float, default=10, show_default=True, help="Seconds from SIGTERM to the end, at most.")
@click.option("--cors-origin", "cors_origins", multiple=True, help="Origin whose pages may call; repeatable; * = all.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain, PEM; with --tls-key.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key, PEM.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_context
def serve(
    context: click.Context,
    model: str,
    dtype: str | None,
    revision: str | None,
    host: str,
    port: int,
    names: tuple[str, ...],
    api_key_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    log_format: Literal["text", "json"],
    **limits: Any,
) -> None:
    """Serve embeddings over HTTP, for existing clients of several vendors.

    \b
    POST /v1/embeddings                       OpenAI and Jina; also GET /v1/models
    POST /v2/embed, /v1/embed                 Cohere
    POST /embed, /embed_all, /similarity, /tokenize; GET /info
                                              text-embeddings-inference
    GET  /health, /ready, /metrics            probes and Prometheus

    The port opens at once; /ready says when the model is loaded. SIGTERM drains.
    """
    try:
        from ..serve import lifecycle, logs, options, state
    except ImportError as error:
        raise click.ClickException(f"the server needs an extra: {how_to_install('serve')}") from error

    keys = options.read_keys(api_key_file, os.environ)
    settings = options.ServeOptions(names=names or (model,), keys=keys, **limits)
    address = lifecycle.Address(host, port, tls_cert, tls_key)
    directory = find_model(model, revision)
    logs.log_to_stderr(log_format)
    context.exit(lifecycle.run(lambda: load_on_this_host(directory, dtype=dtype), state.State(settings), address))
