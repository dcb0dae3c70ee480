"""`fwdllama serve-model`: answers OpenAI's clients with a base model and the adapter of a run, or of a file."""

from __future__ import annotations

import logging
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwdllama.cli import options as o
from fwdllama.errors import DataError, EngineError, UsageError

from ..listen import check_exposure, listening, url_of

if TYPE_CHECKING:
    from gguf_tools.model import ModelInfo

    from ..graceful import GracefulServer
    from .engine import Engine
    from .follow import Follower, Source

ADAPTER, SERVER, MACHINE = "Adapter", "Server", "Engine"
DRAIN_S = 30  # that requests have to finish in when the server is stopped

log = logging.getLogger("fwdllama.inference")


def register(app: typer.Typer) -> None:
    """Add `serve-model`."""

    @app.command("serve-model")
    def serve_model(
        model: o.Model,
        url: Annotated[str | None, typer.Argument(help="Aggregator whose adapter is followed.", metavar="URL", show_default=False)] = None,
        run: Annotated[str | None, o.option(ADAPTER, "Run of the aggregator.", metavar="RUN")] = None,
        follow: Annotated[str, o.option(ADAPTER, "Version: latest, best, or a number.", "latest", metavar="WHICH")] = "latest",
        key_file: Annotated[Path | None, o.option(ADAPTER, "File with the aggregator's key, for a run that is not public.", metavar="FILE")] = None,
        poll: Annotated[float, o.option(ADAPTER, "Seconds between looks for a new version.", "5", min=0.1, metavar="S")] = 5.0,
        adapter: Annotated[Path | None, o.option(ADAPTER, "Instead: a GGUF file, read again when it changes.", metavar="FILE.gguf")] = None,
        host: Annotated[str, o.option(SERVER, "Address to listen on.", "127.0.0.1", metavar="ADDRESS")] = "127.0.0.1",
        port: Annotated[int, o.option(SERVER, "Port; 0 for a free one.", "8081", min=0, max=65535, metavar="N")] = 8081,
        api_key_file: Annotated[Path | None, o.option(SERVER, "File with the key that clients must send.", metavar="FILE")] = None,
        tls_cert: Annotated[Path | None, o.option(SERVER, "Certificate chain, PEM.", metavar="FILE")] = None,
        tls_key: Annotated[Path | None, o.option(SERVER, "Its private key, PEM.", metavar="FILE")] = None,
        insecure: Annotated[bool, o.option(SERVER, "Listen for other machines without a key or TLS.", None, "--insecure")] = False,
        allow_origin: Annotated[list[str] | None, o.option(SERVER, "Web page that may ask, such as http://127.0.0.1:8080.", metavar="ORIGIN")] = None,
        name: Annotated[str | None, o.option(SERVER, "Model id of the base.", "its file's name", metavar="ID")] = None,
        ctx: Annotated[int | None, o.option(MACHINE, "Tokens of a prompt with its answer.", "2048", min=16, metavar="N")] = None,
        parallel: Annotated[int, o.option(MACHINE, "Answers generated at a time.", "4", min=1, max=256, metavar="N")] = 4,
        together: Annotated[
            int | None, o.option(MACHINE, "Answers from which one decode is for all; 2 on a GPU.", "by the model's type", min=2, metavar="N")
        ] = None,
        threads: Annotated[int | None, o.option(MACHINE, "CPU threads.", "one a physical core", min=1, metavar="N")] = None,
    ) -> None:
        """Answer OpenAI's clients with a base model, and with an adapter that may change while it runs."""
        if (url is None) != (run is None):
            raise UsageError("a URL and --run go together: the run's adapter is followed.")
        if url is not None and adapter is not None:
            raise UsageError("a URL and --adapter are both given, but the adapter comes from one of them.")
        if (tls_cert is None) != (tls_key is None):
            raise UsageError("--tls-cert and --tls-key go together.")
        check_exposure(host, key=api_key_file is not None, tls=tls_cert is not None, insecure=insecure)
        from fwdllama.models import resolve
        from gguf_tools.model import read_model_info

        from ..graceful import GracefulServer
        from .app import Service, make_app
        from .engine import open_engine
        from .follow import AggregatorSource, FileSource, Follower, read_key

        levels = {logger: logger.level for logger in (log, logging.getLogger("fwdllama.server"))}
        for logger in levels:
            logger.setLevel(min(logging.getLogger("fwdllama").level or logging.INFO, logging.INFO))
        try:
            path = resolve(model)
            base_id = name or (model if not Path(model).is_file() else path.stem)
            info = read_model_info(path)
            source: Source | None = None
            tuned_id = None
            if url is not None and run is not None:
                source = AggregatorSource(url, run, follow, info, key=read_key(key_file) if key_file is not None else None)
                tuned_id = f"{base_id}:{run}"
            elif adapter is not None:
                source = FileSource(adapter, info)
                tuned_id = f"{base_id}:{adapter.stem}"
            key = read_key(api_key_file) if api_key_file is not None else None
            for file in filter(None, (tls_cert, tls_key)):
                check_readable(file)
            opened = listening(host, port)
            with opened, open_engine(path, n_ctx=ctx, n_parallel=parallel, n_threads=threads, together=together) as engine:
                service = Service(engine, base_id, tuned_id, key, tuple(allow_origin or ()))
                first = _first(source, info) if adapter is not None else None
                if first is not None:
                    engine.offer(first)
                where = url_of(opened, tls=tls_cert is not None)
                ids = " and ".join(filter(None, (base_id, tuned_id)))
                log.info("%s at %s/v1: %d answers at a time, %d tokens each", ids, where, parallel, engine.n_ctx)
                server = GracefulServer(make_app(service), drain_s=DRAIN_S, cert=tls_cert, key=tls_key)
                _serve(server, engine, opened, Follower(source, engine.offer, poll_s=poll) if source is not None else None)
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


def check_readable(path: Path) -> None:
    """Find out before a model is loaded that a file cannot be read.

    Raises:
        DataError: it cannot.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _first(source: Any, info: ModelInfo) -> Any:
    """The file's adapter, which must be right at the start."""
    from .follow import Away

    try:
        return source.poll()
    except Away as trouble:
        raise DataError(f"{trouble}.") from trouble


def _serve(server: GracefulServer, engine: Engine, opened: Any, follower: Follower | None) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that run then may finish.

    Raises:
        EngineError: the engine's thread has failed.
    """
    def watch() -> None:
        engine.wait()
        server.stop()

    threading.Thread(target=watch, name="watch", daemon=True).start()
    with follower or nullcontext():
        server.serve_on(opened)
    if engine.crash is not None:
        raise EngineError(f"the engine has failed: {type(engine.crash).__name__}: {engine.crash}.")
