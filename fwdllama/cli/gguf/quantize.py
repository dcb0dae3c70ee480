"""`fwdllama gguf quantize`: a model in other types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwdllama.cli.gguf import made
from fwdllama.cli.gguf.bar import bar
from fwdllama.errors import UsageError

TYPE = "{type}"  # stands in an output's name for the type


def register(group: typer.Typer) -> None:
    """Add `gguf quantize`."""

    @group.command("quantize")
    def quantize_command(
        model: made.Source,
        out: Annotated[
            str,
            typer.Option("--out", "-o", help=f"File to write; with several types, {TYPE} in it is each one's name.", metavar="FILE"),
        ],
        types: Annotated[
            list[str],
            typer.Option("--type", help="int4 (Q4_0), int8 (Q8_0) or any type of llama.cpp, such as Q4_K_M; may be repeated.", metavar="TYPE"),
        ],
        tensor_types: Annotated[
            list[str] | None,
            typer.Option("--tensor-type", help="Another type for the tensors whose name a regular expression fits, such as "
                         "'attn_v=q8_0'; may be repeated, the first that fits counts.", metavar="PATTERN=TYPE"),
        ] = None,
        output_type: Annotated[str | None, typer.Option(help="Tensor type of the output matrix.", metavar="TYPE")] = None,
        embedding_type: Annotated[str | None, typer.Option(help="Tensor type of the token embeddings.", metavar="TYPE")] = None,
        imatrix: Annotated[
            Path | None, typer.Option(help="Importance data from llama.cpp's imatrix tool; types below 3 bits need it.", metavar="FILE")
        ] = None,
        pure: Annotated[bool, typer.Option("--pure", help="The same type for all matrices, without llama.cpp's mixtures.")] = False,
        only_from_floats: Annotated[
            bool, typer.Option("--only-from-floats", help="Refuse a source that is quantised already, which loses a little more.")
        ] = False,
        threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: all processors.", show_default=False)] = None,
        force: made.Force = False,
        as_json: made.AsJson = False,
    ) -> None:
        """Write a model with its matrices in other types: `fwdllama gguf quantize f16.gguf --type int4 --type int8 -o 'model-{type}.gguf'`."""
        from gguf_tools.model import read_model_info
        from gguf_tools.quantize import quantize_model
        from gguf_tools.recipe import Recipe, file_type, misfits

        names = list(dict.fromkeys(name.lower() for name in types))
        if len(names) > 1 and TYPE not in out:
            raise UsageError(f"--out is {out!r}, but {len(names)} types need a name for each file; put {TYPE} into it.")
        recipes = {
            name: Recipe(name, _pairs(tensor_types or []), output_type, embedding_type, pure, imatrix) for name in names
        }
        for recipe in recipes.values():
            file_type(recipe)  # all types are known before the first is made
        source = read_model_info(model)
        results = []
        for name, recipe in recipes.items():
            with bar(f"{name}: tensor") as progress:
                info = quantize_model(
                    model, out.replace(TYPE, name), recipe, allow_requantize=not only_from_floats, n_threads=threads,
                    progress=progress, force=force,
                )  # fmt: skip
            unfit = misfits(recipe, source)
            if unfit:
                typer.echo(
                    f"note: {name}: rows of {len(unfit)} of {len(source.tensors)} tensors, such as {unfit[0]}, are not whole blocks of "
                    "this type; llama.cpp took larger types for them.",
                    err=True,
                )
            results.append(made.facts(info))
        made.show(results, as_json=as_json)


def _pairs(texts: list[str]) -> tuple[tuple[str, str], ...]:
    found = []
    for text in texts:
        pattern, equals, kind = text.rpartition("=")
        if not (pattern and equals and kind):
            raise UsageError(f"--tensor-type is {text!r}, but must be PATTERN=TYPE, such as attn_v=q8_0.")
        found.append((pattern, kind))
    return tuple(found)
