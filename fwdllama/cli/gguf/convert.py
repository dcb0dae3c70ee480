"""`fwdllama gguf convert`: a Hugging Face LLaMA folder made into a GGUF model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def register(group: typer.Typer) -> None:
    """Add `gguf convert`."""

    @group.command("convert")
    def convert_command(
        folder: Annotated[
            Path, typer.Argument(help="Folder with config.json, safetensors and a tokenizer.", metavar="HF_DIR")
        ],
        output: Annotated[Path, typer.Option("--output", "-o", help="GGUF file to write.", metavar="FILE")],
        type_name: Annotated[
            str, typer.Option("--type", help="Type of the matrices: f32, f16, bf16 or q8_0.", metavar="TYPE")
        ] = "f16",
        force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    ) -> None:
        """Convert a Hugging Face LLaMA to GGUF, and print the path of the file."""
        from gguf_tools.convert import convert_model

        with _shown() as report:
            done = convert_model(folder, output, type=type_name, force=force, progress=report)
        for sentence in done.warnings:
            typer.echo(f"warning: {sentence}", err=True)
        typer.echo(output)


@contextmanager
def _shown() -> Iterator[Callable[[int, int], None]]:
    """Bytes written, as a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
