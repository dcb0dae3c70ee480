"""`fwdllama device`: who has joined, and putting one out."""

from __future__ import annotations

from typing import Annotated

import typer

from . import administrator as a
from .listing import Columns, show, when

COLUMNS: Columns = {
    "device": lambda d: d["device"],
    "name": lambda d: d["name"],
    "last seen": lambda d: when(d["last_seen"]),
    "battery": lambda d: None if d["battery"] is None else f"{d['battery']:.0%}" + (" charging" if d["charging"] else ""),
    "results": lambda d: d["n_results"],
    "probes": lambda d: d["n_probes"],
    "refused": lambda d: d["n_refused"],
    "wasted": lambda d: d["n_wasted"],
    "revoked": lambda d: when(d["revoked_at"]),
}


def register(app: typer.Typer) -> None:
    """Add `device list` and `device revoke`."""
    group = typer.Typer(help="Devices of an aggregator.")

    @group.command("list")
    def list_command(url: a.Url = a.DEFAULT_URL, key_file: a.KeyFile = None, as_json: a.Json = False) -> None:
        """Devices, and what each has done."""
        with a.administrator(url, key_file) as admin:
            found = list(admin.pages("/v1/devices", "after", "device"))
        show(found, COLUMNS, as_json=as_json, empty="no device has joined; fwdllama token create says how one does")

    @group.command("revoke")
    def revoke_command(
        device: Annotated[str, typer.Argument(help="Id of the device.")], url: a.Url = a.DEFAULT_URL, key_file: a.KeyFile = None
    ) -> None:
        """Refuse everything from a device, from now on; what it has contributed stays."""
        with a.administrator(url, key_file) as admin:
            admin.ask("DELETE", f"/v1/devices/{a.name(device)}")
        typer.echo(f"device {device} is revoked", err=True)

    app.add_typer(group, name="device")
