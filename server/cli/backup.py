"""`fwdllama backup` and `fwdllama restore`: an aggregator's folder as one file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwdllama.errors import UsageError
from fwdllama.formats import size


def register(app: typer.Typer) -> None:
    """Add `backup` and `restore`."""

    @app.command("backup")
    def backup_command(
        folder: Annotated[Path, typer.Argument(help="The aggregator's folder; it may be served meanwhile.")],
        out: Annotated[Path, typer.Option("--out", "-o", help="File to write.", metavar="FILE")],
        with_secrets: Annotated[
            bool, typer.Option("--with-secrets", help="Put the administrator's key and the devices' secret in it too; keep it as safe as them.")
        ] = False,
        force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    ) -> None:
        """Write the database of an aggregator to one file, as it is at this moment, and print its path."""
        try:
            from ..backup import SECRETS, back_up
        except ModuleNotFoundError as error:
            raise UsageError(f"the aggregator needs {error.name}: pip install 'fwdllama[server]'.") from error
        back_up(folder, out, with_secrets=with_secrets, force=force)
        typer.echo(out)
        typer.echo(f"{size(out.stat().st_size)}, made in one moment", err=True)
        if not with_secrets:
            typer.echo(f"it holds no secrets: keep {folder / SECRETS[0]} too, without which no device is recognised", err=True)

    @app.command("restore")
    def restore_command(
        file: Annotated[Path, typer.Argument(help="A backup.")],
        folder: Annotated[Path, typer.Argument(help="Folder to make; there must be no database in it.")],
    ) -> None:
        """Make an aggregator's folder of a backup; `fwdllama serve` then goes on with every run."""
        try:
            from ..backup import SECRETS, restore
        except ModuleNotFoundError as error:
            raise UsageError(f"the aggregator needs {error.name}: pip install 'fwdllama[server]'.") from error
        restore(file, folder)
        typer.echo(folder)
        missing = [name for name in SECRETS if not (folder / name).exists()]
        if missing:
            typer.echo(
                f"warning: the backup holds no secrets; put the old {' and '.join(missing)} into {folder} before it is served, "
                "or every device must enrol again.",
                err=True,
            )
