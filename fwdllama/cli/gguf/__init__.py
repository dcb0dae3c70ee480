"""`fwdllama gguf`: make, check and convert model and adapter files. One module a command, or a pair of them."""

from __future__ import annotations

from types import ModuleType

import typer

from fwdllama.cli.gguf import average, convert, diff, inspect, merge, peft, plan, quantize, split, synth, validate

MODULES: tuple[ModuleType, ...] = (  # each has register(group)
    average,
    convert,
    diff,
    inspect,
    merge,
    peft,
    plan,
    quantize,
    split,
    synth,
    validate,
)


def register(app: typer.Typer) -> None:
    """Add the group `gguf`."""
    group = typer.Typer(help="Make, check and convert model and adapter files.")
    for module in MODULES:
        module.register(group)
    app.add_typer(group, name="gguf")
