"""`fwdllama serve`: the aggregator of a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fwdllama.errors import UsageError

if TYPE_CHECKING:
    from ..context import Context
    from ..serving import Setting

FIRST_TOKEN_S = 7 * 86_400.0
ADDRESS, LIMITS = "Where it is served", "Limits"
Folder = Annotated[Path, typer.Argument(help="The aggregator's folder: its keys, and its database unless --database is given.")]
Database = Annotated[
    str | None, typer.Option(help="Another database: postgresql://user:password@host/name.", metavar="URL", envvar="FWDLLAMA_DATABASE")
]


def register(app: typer.Typer) -> None:
    """Add `serve`."""

    @app.command("serve")
    def serve_command(
        folder: Folder = Path("aggregator"),
        host: Annotated[str, typer.Option(help="Address to serve on.", rich_help_panel=ADDRESS)] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.", rich_help_panel=ADDRESS)] = 8470,
        tls_cert: Annotated[
            Path | None, typer.Option(help="Certificate chain, PEM.", metavar="FILE", rich_help_panel=ADDRESS)
        ] = None,
        tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.", metavar="FILE", rich_help_panel=ADDRESS)] = None,
        behind_proxy: Annotated[
            bool, typer.Option("--behind-proxy", help="A proxy ends TLS and says who asks (X-Forwarded-For).", rich_help_panel=ADDRESS)
        ] = False,
        proxies: Annotated[
            str, typer.Option(help="Addresses of proxies that are believed.", metavar="ADDRESS,...", rich_help_panel=ADDRESS)
        ] = "127.0.0.1,::1",
        insecure: Annotated[
            bool, typer.Option("--insecure", help="Serve others without TLS, where everybody on the way is trusted.", rich_help_panel=ADDRESS)
        ] = False,
        database: Database = None,
        migrate: Annotated[bool, typer.Option("--migrate", help="Bring a database of an older version up to date.")] = False,
        workers: Annotated[int, typer.Option(min=1, max=64, help="Processes; more than one needs PostgreSQL.")] = 1,
        model_server: Annotated[
            str | None, typer.Option(help="Where `fwdllama serve-model` answers, for the dashboard.", metavar="URL")
        ] = None,
        public_metrics: Annotated[bool, typer.Option("--public-metrics", help="Serve /metrics to others without a key too.")] = False,
        log_format: Annotated[Literal["text", "json"], typer.Option(help="The log on stderr.")] = "text",
        max_devices: Annotated[int, typer.Option(min=1, help="Devices that may enrol.", rich_help_panel=LIMITS)] = 100_000,
        requests_per_s: Annotated[float, typer.Option(min=0.01, help="Of one device, for each worker.", rich_help_panel=LIMITS)] = 20.0,
        newcomers_per_s: Annotated[
            float, typer.Option(min=0.01, help="Enrolments and refused keys, of one address.", rich_help_panel=LIMITS)
        ] = 2.0,
        body_bytes: Annotated[int, typer.Option(min=1024, help="Largest body of a request.", rich_help_panel=LIMITS)] = 256 * 1024,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout that says where it is served.")] = False,
    ) -> None:
        """Serve the aggregator of a folder, made on first use, until Ctrl-C.

        Says where the dashboard is, and the command that enrols a device.
        """
        try:
            from ..limits import Limits
            from ..serving import Setting, bound, check_tls, serve
            from ..workers import supervise
        except ModuleNotFoundError as error:
            raise UsageError(f"the aggregator needs {error.name}: pip install 'fwdllama[server]'.") from error
        if workers > 1 and (database is None or database.startswith("sqlite")):
            raise UsageError(f"--workers {workers} needs PostgreSQL: give --database postgresql://..., or leave --workers out.")
        setting = Setting(
            folder,
            host,
            port,
            database,
            check_tls(tls_cert, tls_key),
            proxies if behind_proxy else None,
            insecure,
            model_server,
            public_metrics,
            Limits(
                body_bytes=body_bytes, requests_per_s=requests_per_s, newcomers_per_s=newcomers_per_s, devices=max_devices
            ),
            log_format,
        )
        with bound(setting) as listening:
            context = setting.open(migrate=migrate)
            try:
                told(setting, context, listening.getsockname()[1], as_json=as_json)
            except BaseException:
                context.store.close()
                raise
            if workers == 1:
                serve(setting, context, listening)
                return
            context.store.close()
            raise typer.Exit(supervise(setting, listening, workers))


def told(setting: Setting, context: Context, port: int, *, as_json: bool) -> None:
    """Say where everything is. Keys and tokens are shown to a person or a program that asked, and never end in a log file."""
    from ..opening import database_url, named

    url = setting.url(port)
    key_file = (setting.folder / "admin.key").resolve()
    shown = as_json or sys.stderr.isatty()
    token = _first_token(context) if shown else None
    facts: dict[str, Any] = {
        "url": url,
        "dashboard": f"{url}/",
        "key_file": str(key_file),
        "database": named(database_url(setting.folder, setting.database)),
        "token": token,
    }
    if as_json:
        typer.echo(json.dumps(facts))
        sys.stdout.flush()
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"aggregator  {url}  (Ctrl-C stops it)", markup=False)
    if shown:
        console.print(f"dashboard   {url}/#key={context.secrets.admin}", markup=False)
    else:
        console.print(f"dashboard   {url}/  (the key is in {key_file})", markup=False)
    if token:
        console.print(f"enrol       fwdllama join {url} --token {token} --model M.gguf --data mine.json", markup=False)
        console.print(f"            (for a week and any number of devices; others: fwdllama token create --url {url})", markup=False)
    else:
        console.print(f"enrol       fwdllama token create --url {url}", markup=False)


def _first_token(context: Context) -> str | None:
    """An enrolment token, where none was ever made."""
    import sqlalchemy as sa

    from ..administration import NewToken, new_token
    from ..schema import tokens

    def make(connection: sa.Connection) -> str | None:
        if connection.execute(sa.select(tokens.c.id).limit(1)).first():
            return None
        return new_token(connection, NewToken(name="first", expires_s=FIRST_TOKEN_S), context.now()).token

    return context.store.submit(make).result()
