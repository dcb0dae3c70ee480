"""`fwdllama gguf convert`: a Hugging Face LLaMA folder made into a GGUF model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwdllama.cli.gguf import made
from fwdllama.cli.gguf.bar import bar


def register(group: typer.Typer) -> None:
    """Add `gguf convert`."""

    @group.command("convert")
    def convert_command(
        folder: Annotated[
            Path, typer.Argument(help="Folder with config.json, safetensors and a tokenizer.", metavar="HF_DIR")
        ],
        out: made.Out,
        type_name: Annotated[
            str, typer.Option("--type", help="Type of the matrices: f32, f16, bf16 or q8_0.", metavar="TYPE")
        ] = "f16",
        force: made.Force = False,
    ) -> None:
        """Convert a Hugging Face LLaMA to GGUF, and print the path of the file."""
        from gguf_tools.convert import convert_model

        with bar("converting") as report:
            done = convert_model(folder, out, type=type_name, force=force, progress=report)
        for sentence in done.warnings:
            typer.echo(f"warning: {sentence}", err=True)
        typer.echo(out)

