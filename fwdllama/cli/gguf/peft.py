"""`fwdllama gguf peft`: adapters as PEFT keeps them, and as llama.cpp does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwdllama.cli.gguf import made

_Base = Annotated[
    str, typer.Option("--base", help="The base model: a name such as smollm2-135m, or a GGUF file.", metavar="MODEL")
]


def register(group: typer.Typer) -> None:
    """Add `gguf peft to-gguf` and `gguf peft from-gguf`."""
    peft = typer.Typer(help="Adapters between PEFT and GGUF, both ways.")

    @peft.command("to-gguf")
    def to_gguf_command(
        folder: Annotated[
            Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.", metavar="PEFT_DIR")
        ],
        base: _Base,
        out: made.Out,
        force: made.Force = False,
    ) -> None:
        """Make a GGUF adapter from one that PEFT saved, and print its path."""
        from fwdllama.models import resolve
        from gguf_tools.adapter import adapter_bytes
        from gguf_tools.model import read_model_info
        from gguf_tools.output import new_file
        from gguf_tools.peft import read_peft

        data = adapter_bytes(read_peft(folder, read_model_info(resolve(base))))
        with new_file(out, force=force) as temporary:
            temporary.write_bytes(data)
        typer.echo(out)

    @peft.command("from-gguf")
    def from_gguf_command(
        adapter: Annotated[Path, typer.Argument(help="GGUF adapter.", metavar="FILE")],
        base: _Base,
        out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", metavar="PEFT_DIR")],
        base_name: Annotated[
            str | None,
            typer.Option(help="The base model's name on Hugging Face, or its folder. Default: its name in the GGUF file."),
        ] = None,
        force: made.Force = False,
    ) -> None:
        """Save a GGUF adapter as PEFT loads it, and print the folder."""
        from fwdllama.models import resolve
        from gguf_tools.adapter import read_adapter
        from gguf_tools.model import read_model_info
        from gguf_tools.peft import write_peft
        from gguf_tools.validate import validate_adapter

        model = read_model_info(resolve(base))
        validate_adapter(adapter, model)
        write_peft(out, read_adapter(adapter), model, base_name=base_name, force=force)
        typer.echo(out)

    group.add_typer(peft, name="peft")
