"""`fwdllama gguf merge`: an adapter added into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwdllama.cli.gguf import made
from fwdllama.cli.gguf.bar import bar

LARGE = 1.0  # rounding as large as the change: half of what the adapter learned may be gone


def register(group: typer.Typer) -> None:
    """Add `gguf merge`."""

    @group.command("merge")
    def merge_command(
        base: Annotated[Path, typer.Argument(help="Base model, a GGUF file.", metavar="BASE", show_default=False)],
        adapter: Annotated[Path, typer.Argument(help="LoRA adapter for it, a GGUF file.", metavar="ADAPTER", show_default=False)],
        out: made.Out,
        kind: Annotated[
            str,
            typer.Option("--type", help="same: matrices keep their types; f16, f32, q8_0, int4, ...: all matrices are stored as that.",
                         metavar="TYPE"),
        ] = "same",
        everywhere: Annotated[
            bool,
            typer.Option("--everywhere", help="Merge an adapter of scope 'answer' too, although it will then be on for the whole prompt."),
        ] = False,
        force: made.Force = False,
        as_json: made.AsJson = False,
    ) -> None:
        """Write a model with an adapter added to its weights, for programs that load no adapters."""
        from gguf_tools.merge import merge_adapter
        from gguf_tools.model import read_model_info

        with bar("merging") as progress:
            merged = merge_adapter(base, adapter, out, type=kind, everywhere=everywhere, force=force, progress=progress)
        found = made.facts(read_model_info(out))
        found |= {"adapted": len(merged.names), "change_rms": merged.change, "rounding_rms": merged.error}
        if merged.error > LARGE * merged.change:
            typer.echo(
                f"note: storing the merged weights rounds them by {merged.error:.2g}, more than the adapter changed them ({merged.change:.2g}, "
                "root mean squares); --type f16 or q8_0 keeps more of it.",
                err=True,
            )
        made.show(found, as_json=as_json)
