"""`fwdllama gguf average`: the weighted mean of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwdllama.cli.gguf import made
from fwdllama.errors import UsageError


def register(group: typer.Typer) -> None:
    """Add `gguf average`."""

    @group.command("average")
    def average_command(
        files: Annotated[list[Path], typer.Argument(help="Adapters of the same model, scope and tensors.", metavar="ADAPTER...")],
        out: made.Out,
        weights: Annotated[
            str | None, typer.Option(help="A weight for each adapter, such as 3,1; they need not add up to 1. Default: equal.", metavar="X,X")
        ] = None,
        concatenate: Annotated[
            bool, typer.Option("--concatenate", help="Where A differs, keep the exact mean at the sum of the ranks, instead of refusing.")
        ] = False,
        force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there already.")] = False,
    ) -> None:
        """Write the adapter whose change to the model is the weighted mean of the others', and print its path.

        It is exact: where all have the same A, B is averaged; where not, it is refused, or made with --concatenate.
        """
        from gguf_tools.adapter import adapter_bytes
        from gguf_tools.average import average_files
        from gguf_tools.output import new_file

        with new_file(out, force=force) as temporary:
            temporary.write_bytes(adapter_bytes(average_files(files, _numbers(weights), concatenate=concatenate)))
        typer.echo(out)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights is {text!r}, but must be numbers with commas between them, such as 3,1.") from None
