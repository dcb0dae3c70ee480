"""`fwdllama gguf synth`: a model with random weights, to measure with or to test on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fwdllama.cli.gguf import made
from fwdllama.cli.gguf.bar import bar
from fwdllama.errors import UsageError

PRESET_NAMES = "tiny, smollm2-135m, tinyllama-1.1b, llama-7b, llama2-13b or llama3-8b"
SIZES = "Sizes, where they are not those of --like"


def _size(help: str) -> Any:
    return typer.Option(help=help, metavar="N", rich_help_panel=SIZES, show_default=False)


def register(group: typer.Typer) -> None:
    """Add `gguf synth`."""

    @group.command("synth")
    def synth_command(
        out: made.Out,
        like: Annotated[
            str, typer.Option(help=f"Shape: {PRESET_NAMES}; or a GGUF file, whose tokenizer is taken too.", metavar="NAME|FILE")
        ] = "tiny",
        kind: Annotated[
            str | None,
            typer.Option("--type", help="Tensor type of all matrices: f32, f16, q8_0, q4_0, int4, q4_k, ... Default: f16, or a file's own.",
                         metavar="TYPE", show_default=False),
        ] = None,
        seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same file.")] = 0,
        n_layers: Annotated[int | None, _size("Layers.")] = None,
        n_embd: Annotated[int | None, _size("Values of a token between layers.")] = None,
        n_head: Annotated[int | None, _size("Attention heads.")] = None,
        n_head_kv: Annotated[int | None, _size("Heads that have keys and values of their own.")] = None,
        n_ff: Annotated[int | None, _size("Values within a feed-forward part.")] = None,
        n_vocab: Annotated[int | None, _size("Tokens of the vocabulary.")] = None,
        context_length: Annotated[int | None, _size("Longest context that the file names.")] = None,
        tied: Annotated[
            bool | None,
            typer.Option("--tied/--untied", help="Embeddings and output are one matrix.", show_default=False, rich_help_panel=SIZES),
        ] = None,
        force: made.Force = False,
        as_json: made.AsJson = False,
    ) -> None:
        """Write a model with random weights that llama.cpp loads: `fwdllama gguf synth --like llama-7b --type q4_0 -o 7b.gguf`."""
        from gguf_tools.model import read_model_info
        from gguf_tools.shape import PRESETS
        from gguf_tools.synth import write_like, write_llama

        sizes = {
            "n_layers": n_layers, "n_embd": n_embd, "n_head": n_head, "n_head_kv": n_head_kv, "n_ff": n_ff, "n_vocab": n_vocab,
            "context_length": context_length, "tied": tied,
        }  # fmt: skip
        given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
        shape = PRESETS.get(like.lower())
        if shape is None and not (like.endswith(".gguf") or Path(like).exists()):
            raise UsageError(f"--like is {like!r}, but must be {PRESET_NAMES}, or the path of a GGUF file.")
        if shape is None and given:
            raise UsageError(f"--{next(iter(given)).replace('_', '-')} goes with a named shape, but --like is the file {like}.")
        with bar("writing") as progress:
            if shape is None:
                write_like(out, like, type=kind, seed=seed, force=force, progress=progress)
            else:
                write_llama(out, replace(shape, **given), type=kind or "F16", seed=seed, force=force, progress=progress)
        made.show(made.facts(read_model_info(out)), as_json=as_json)
