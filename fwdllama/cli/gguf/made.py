"""How the commands that make model files say what they made, and the options they share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwdllama.formats import size

if TYPE_CHECKING:
    from gguf_tools.model import ModelInfo

Source = Annotated[Path, typer.Argument(help="Model, a GGUF file.", metavar="MODEL", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write.", metavar="FILE", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there already.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")]


def facts(info: ModelInfo) -> dict[str, Any]:
    """A model file in numbers."""
    return {
        "path": str(info.path),
        "architecture": info.architecture,
        "layers": info.n_layers,
        "size_bytes": info.size_bytes,
        "types": dict(Counter(kind for _, kind in info.tensors.values()).most_common()),
    }


def show(found: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print what was made: as JSON, or a line for each fact."""
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for entry in [found] if isinstance(found, Mapping) else found:
        for key, value in entry.items():
            if key == "size_bytes":
                key, value = "size", size(value)
            if isinstance(value, Mapping):
                value = ", ".join(f"{count} {name}" for name, count in value.items())
            typer.echo(f"{key:14} {value}")
