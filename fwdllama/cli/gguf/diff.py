"""`fwdllama gguf diff`: how two adapters, or two models, differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gguf_tools.difference import TensorDifference


def register(group: typer.Typer) -> None:
    """Add `gguf diff`."""

    @group.command("diff")
    def diff_command(
        a: Annotated[Path, typer.Argument(help="Adapter or model.", metavar="A")],
        b: Annotated[Path, typer.Argument(help="Another of the same kind.", metavar="B")],
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """Compare two adapters or two models tensor by tensor: norms, relative difference and cosine.

        Of adapters the change to the model is compared, so rank and scale may differ; models may be quantised differently.
        """
        from fwdllama.cli.gguf.bar import bar
        from gguf_tools.difference import difference

        with bar("comparing") as progress:
            found = difference(a, b, progress=progress)
        if as_json:
            facts = {
                "kind": found.kind,
                "only_a": found.only_a,
                "only_b": found.only_b,
                "total": _facts(found.total),
                "tensors": [_facts(tensor) for tensor in found.tensors],
            }
            typer.echo(json.dumps(facts, indent=2))
            return
        _print([*found.tensors, found.total])
        for path, names in ((a, found.only_a), (b, found.only_b)):
            if names:
                typer.echo(f"Only in {path}: {', '.join(names)}.")


def _facts(tensor: TensorDifference) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "norm_a": tensor.norm_a,
        "norm_b": tensor.norm_b,
        "norm_difference": tensor.norm_difference,
        "relative": tensor.relative,
        "cosine": tensor.cosine,
    }


def _print(tensors: list[TensorDifference]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fwdllama.formats import MISSING

    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "|a|", "|b|", "|a - b|", "relative", "cosine"):
        table.add_column(heading, justify="left" if heading == "tensor" else "right")
    for tensor in tensors:
        numbers = (tensor.norm_a, tensor.norm_b, tensor.norm_difference, tensor.relative)
        cosine = MISSING if tensor.cosine is None else f"{tensor.cosine:.5f}"
        table.add_row(*map(Text, (tensor.name, *(MISSING if number is None else f"{number:.4g}" for number in numbers), cosine)))
    Console().print(table)
