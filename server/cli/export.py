"""`fwdllama run export`: a version of the adapter as a file for llama.cpp, and as a folder for PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from fwdllama.errors import ResourceError, UsageError

from . import administrator as a

VERSION = re.compile(r"latest|best|[0-9]{1,9}")


def export_command(
    run: Annotated[str, typer.Argument(help="Name or id of the run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Adapter file to write.", metavar="FILE.gguf")],
    version: Annotated[str, typer.Option(help="latest, best or a number.", metavar="VERSION")] = "latest",
    peft: Annotated[Path | None, typer.Option(help="Folder to write it to for PEFT too.", metavar="FOLDER")] = None,
    model: Annotated[str | None, typer.Option(help="Base model, for --peft: a name or a GGUF file.", metavar="MODEL")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    url: a.Url = a.DEFAULT_URL,
    key_file: a.KeyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the path.")] = False,
) -> None:
    """Download a version's adapter, compare it with its hash, and print its path; what broke off goes on where it stopped."""
    if VERSION.fullmatch(version) is None:
        raise UsageError(f"--version is {version!r}, but must be latest, best or a number.")
    if (peft is None) != (model is None):
        raise UsageError("--peft and --model belong together: PEFT's file names the matrices as the base model does.")
    if out.is_dir():
        raise ResourceError(f"{out}: is a folder, but a file to write was expected.")
    if out.exists() and not force:
        raise ResourceError(f"{out}: already exists; give another name, or --force to replace it.")
    if not out.parent.is_dir():
        raise ResourceError(f"{out}: the folder {out.parent} does not exist; create it first.")
    with a.administrator(url, key_file) as admin:
        # By number, so that a new version between two attempts does not make a file of both.
        number = admin.ask("GET", f"/v1/runs/{a.name(run)}/versions/{version}")["version"]
        headers = admin.download(f"/v1/runs/{run}/versions/{number}/adapter.gguf", out)
    scope = headers.get("x-fwdllama-scope", "all")
    if scope == "answer":
        typer.echo("note: it is on from the answer only, which llama-server and fwdllama honour; other runtimes would use it wrongly.", err=True)
    if peft is not None and model is not None:
        _to_peft(out, peft, model, force)
    if as_json:
        facts = {"path": str(out), "version": number, "sha256": headers["etag"].strip('"'), "scope": scope}
        typer.echo(json.dumps({**facts, "peft": None if peft is None else str(peft)}))
    else:
        typer.echo(out)
        typer.echo(f"version {number}, sha256:{headers['etag'].strip(chr(34))}", err=True)


def _to_peft(adapter: Path, folder: Path, model: str, force: bool) -> None:
    from fwdllama.models import resolve
    from gguf_tools.adapter import read_adapter
    from gguf_tools.model import read_model_info
    from gguf_tools.peft import write_peft
    from gguf_tools.validate import validate_adapter

    base = read_model_info(resolve(model))
    validate_adapter(adapter, base)
    write_peft(folder, read_adapter(adapter), base, force=force)
