"""`fwdllama token`: enrolment tokens."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from . import administrator as a
from .listing import Columns, show, when

COLUMNS: Columns = {
    "id": lambda t: t["id"],
    "name": lambda t: t["name"],
    "uses left": lambda t: "any" if t["uses_left"] is None else t["uses_left"],
    "expires": lambda t: "never" if t["expires_at"] is None else when(t["expires_at"]),
    "made": lambda t: when(t["created_at"]),
    "revoked": lambda t: when(t["revoked_at"]),
}


def register(app: typer.Typer) -> None:
    """Add `token create`, `token list` and `token revoke`."""
    group = typer.Typer(help="Enrolment tokens, with which devices join an aggregator.")

    @group.command("create")
    def create_command(
        name: Annotated[str, typer.Option(help="What it is for.")] = "devices",
        uses: Annotated[int | None, typer.Option(min=1, help="So many devices may enrol with it; default: any number.")] = None,
        expires: Annotated[float | None, typer.Option(min=1, help="Seconds until it expires; default: never.", metavar="S")] = None,
        url: a.Url = a.DEFAULT_URL,
        key_file: a.KeyFile = None,
        as_json: a.Json = False,
    ) -> None:
        """Make a token and print it, this once: the aggregator keeps only its hash."""
        body: dict[str, Any] = {"name": name, "uses": uses, "expires_s": expires}
        with a.administrator(url, key_file) as admin:
            made = admin.ask("POST", "/v1/tokens", json=body)
        if as_json:
            typer.echo(json.dumps(made, indent=2))
            return
        typer.echo(made["token"])
        typer.echo(f"enrol a device: fwdllama join {url} --token {made['token']} --model M.gguf --data mine.json", err=True)

    @group.command("list")
    def list_command(url: a.Url = a.DEFAULT_URL, key_file: a.KeyFile = None, as_json: a.Json = False) -> None:
        """Tokens, newest first; what they are is not kept."""
        with a.administrator(url, key_file) as admin:
            found = admin.ask("GET", "/v1/tokens")
        show(found, COLUMNS, as_json=as_json, empty="there are no tokens; make one with: fwdllama token create")

    @group.command("revoke")
    def revoke_command(
        token: Annotated[str, typer.Argument(help="Id of the token.")], url: a.Url = a.DEFAULT_URL, key_file: a.KeyFile = None
    ) -> None:
        """Let nobody enrol with a token any more; devices that did stay."""
        with a.administrator(url, key_file) as admin:
            admin.ask("DELETE", f"/v1/tokens/{a.name(token)}")
        typer.echo(f"token {token} is revoked", err=True)

    app.add_typer(group, name="token")
