"""`fwdllama gguf validate`: whether llama.cpp can be given a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def register(group: typer.Typer) -> None:
    """Add `gguf validate`."""

    @group.command("validate")
    def validate_command(
        file: Annotated[Path, typer.Argument(help="Model or adapter.", metavar="FILE")],
        base: Annotated[
            str | None, typer.Option(help="The model that an adapter must fit: a name, or the path of a GGUF file.", metavar="MODEL")
        ] = None,
        data: Annotated[bool, typer.Option("--data", help="Look at all of a model's numbers too, not only at its vectors.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    ) -> None:
        """Check everything that llama.cpp would trust in a model or an adapter; the first thing wrong is said, with exit code 1."""
        from fwdllama.cli.gguf.bar import bar
        from fwdllama.models import resolve
        from gguf_tools.model import read_model_info
        from gguf_tools.soundness import validate_file

        info = None if base is None else read_model_info(resolve(base))
        with bar("reading") as progress:
            verdict = validate_file(file, base=info, data=data, progress=progress)
        if as_json:
            typer.echo(json.dumps({"path": str(file), "valid": True, **asdict(verdict)}, indent=2))
            return
        typer.echo(f"{file}: is a valid {verdict.architecture} {verdict.kind} of {verdict.n_tensors} tensors.")
        for what in verdict.unchecked:
            typer.echo(f"Not checked: {what}.")
