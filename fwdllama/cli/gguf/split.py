"""`fwdllama gguf split`: a model cut into trunk and top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwdllama.cli.gguf import made
from fwdllama.cli.gguf.bar import bar
from fwdllama.errors import EngineError


def register(group: typer.Typer) -> None:
    """Add `gguf split`."""

    @group.command("split")
    def split_command(
        model: made.Source,
        at: Annotated[int, typer.Option(help="First layer of the top, counted from 0.", metavar="K")],
        out: Annotated[tuple[Path, Path], typer.Option("--out", "-o", help="Files to write.", metavar="TRUNK TOP")],
        check: Annotated[
            bool, typer.Option("--check", help="Compare both with the whole model on random tokens: every logit must be equal to the bit.")
        ] = False,
        tokens: Annotated[int, typer.Option(min=1, max=2048, help="Random tokens for --check.")] = 64,
        threads: Annotated[int, typer.Option(min=1, help="Threads for --check.")] = 2,
        force: made.Force = False,
        as_json: made.AsJson = False,
    ) -> None:
        """Cut a model at layer K: the trunk gives the values that enter layer K, the top takes them and gives the logits."""
        from gguf_tools.split import split_model

        trunk, top = out
        with bar("copying") as progress:
            lower, upper = split_model(model, at, trunk, top, progress=progress, force=force)
        found = {"trunk": made.facts(lower), "top": made.facts(upper)}
        if check:
            from fwdllama.llama.seam import compare

            seam = compare(model, trunk, top, at, n_tokens=tokens, n_threads=threads)
            if not seam.whole:
                raise EngineError(
                    f"{trunk} and {top} are not {model}: {seam.n_different} of {seam.n_logits} logits differ, by up to "
                    f"{seam.largest_difference:.3g}. Do not use them, and report the model."
                )
            found["check"] = {"tokens": seam.n_tokens, "logits": seam.n_logits, "different": seam.n_different}
        if as_json:
            made.show(found, as_json=True)
            return
        made.show([found["trunk"], found["top"]], as_json=False)
        if check:
            typer.echo(f"{'check':14} {seam.n_logits} logits of {seam.n_tokens} random tokens are equal to the bit")
