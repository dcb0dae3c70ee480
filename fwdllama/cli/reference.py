"""The hidden command `reference`, which writes the command reference of the documentation from the help texts.

It is `fwdllama reference > docs/cli.md`; a test says when that is due.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from fwdllama.cli.options import say_defaults

NAME = "reference"
INTRODUCTION = """\
# Commands

Made from the help texts by `fwdllama reference > docs/cli.md`.

Results go to stdout, progress and warnings to stderr. A failure is one line, `error: ...`. Exit codes: 0 done,
1 failed, 2 the command line cannot be, 130 interrupted.
"""


def register(app: typer.Typer) -> None:
    """Add `reference`."""

    @app.command(NAME, hidden=True)
    def reference_command(context: typer.Context) -> None:
        """Print the command reference as Markdown."""
        root: Any = context.find_root().command
        typer.echo("\n".join([INTRODUCTION, *_lines(root, "fwdllama")]).rstrip())


def _lines(command: Any, path: str) -> Iterator[str]:
    """A section for a command, then one for each of its own; what typer gives is not typed."""
    yield f"## {path}\n"
    if command.help:
        yield _plain(command.help) + "\n"
    say_defaults(command)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden and p.name != "help"]
    children = getattr(command, "commands", {})
    words = [path, *(f"[{p.name.upper()}]" if not p.required else p.name.upper() for p in arguments)]
    yield f"    {' '.join([*words, *(['[OPTIONS]'] if options else []), *(['COMMAND'] if children else [])])}\n"
    for argument in arguments:
        yield f"- `{argument.name.upper()}`: {_plain(argument.help or '')}"
    if arguments:
        yield ""
    for panel in dict.fromkeys(p.rich_help_panel for p in options):
        yield f"| {panel or 'Options'} | |\n|---|---|"
        for parameter in options:
            if parameter.rich_help_panel == panel:
                yield f"| {_flags(parameter)} | {_meaning(parameter)} |"
        yield ""
    for name, child in children.items():
        if not child.hidden:
            yield from _lines(child, f"{path} {name}")


def _flags(parameter: Any) -> str:
    flags = " / ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
    return flags + (f" {parameter.metavar}" if parameter.metavar else "")


def _meaning(parameter: Any) -> str:
    text = _plain(parameter.help or "")
    if parameter.required:
        return f"{text} **Required.**"
    default = parameter.default
    if not parameter.show_default or isinstance(default, bool | type(None)):
        return text
    return f"{text} Default: {getattr(default, 'value', default)}."


def _plain(text: str) -> str:
    """One paragraph a line; bars would end a table's cell."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return "\n\n".join(paragraphs).replace("|", "\\|")
