"""`fwdllama gguf inspect`: what a model or an adapter is, from its header."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gguf_tools.inspect import AdapterView, ModelView, Role, Token

MOST_METADATA = 100  # characters of a value in the text form; --json has all of it


def register(group: typer.Typer) -> None:
    """Add `gguf inspect`."""

    @group.command("inspect")
    def inspect_command(
        file: Annotated[Path, typer.Argument(help="Model or adapter.", metavar="FILE")],
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text; it has the whole chat template.")] = False,
    ) -> None:
        """Say what a model or an adapter is: sizes, quantisation by role, tokenizer, or base, rank and scope. Weights are not read."""
        from gguf_tools.inspect import inspect_file

        view = inspect_file(file)
        if as_json:
            typer.echo(json.dumps(asdict(view), indent=2, ensure_ascii=False))
            return
        _print(_model(view) if view.kind == "model" else _adapter(view), view.roles)


def _print(facts: list[tuple[str, str]], roles: tuple[Role, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fwdllama.formats import size

    console = Console()
    grid = Table.grid(padding=(0, 2))
    for name, value in facts:
        grid.add_row(Text(name, style="bold"), Text(value))
    console.print(grid)
    table = Table(box=None, pad_edge=False)
    for heading in ("tensors", "number", "shape", "type", "parameters", "size"):
        table.add_column(heading, justify="right" if heading in ("number", "parameters", "size") else "left")
    for role in roles:
        types = ", ".join(f"{n} {name}" if len(role.types) > 1 else name for name, n in role.types.items())
        shape = " x ".join(map(str, role.shape))
        cells = (role.role, str(role.n_tensors), shape, types, f"{role.n_parameters:,}", size(role.size_bytes))
        table.add_row(*map(Text, cells))
    console.print()
    console.print(table)


def _model(view: ModelView) -> list[tuple[str, str]]:
    from fwdllama.formats import size

    tokenizer, template = view.tokenizer, view.chat_template
    special = {"BOS": tokenizer.bos, "EOS": tokenizer.eos, "end of turn": tokenizer.end_of_turn}
    return [
        ("model", view.name),
        ("architecture", view.architecture),
        ("file", f"{size(view.size_bytes)}, {view.n_parameters:,} parameters, {view.bits_per_weight:.2f} bits each, mostly {view.quantisation}"),
        ("layers", f"{view.n_layers} of width {view.n_embd}, feed-forward {view.n_ff if view.n_ff is not None else 'unknown'}"),
        ("heads", f"{view.n_head}, sharing {view.n_head_kv} of keys and values"),
        ("context", f"{view.context_length:,} tokens; KV cache in F16: {size(view.kv_bytes_per_token)} a token"),
        ("embeddings", "tied to the output" if view.tied_embeddings else "apart from the output"),
        ("tokenizer", f"{tokenizer.model}{f' ({tokenizer.pre})' if tokenizer.pre else ''}, {tokenizer.n_tokens:,} tokens"),
        ("special tokens", ", ".join(f"{name} {_token(token)}" for name, token in special.items())),
        ("texts begin", "with BOS" if tokenizer.adds_bos else "without BOS"),
        ("chat template", "none" if template is None else f"{len(template):,} characters"),
    ]


def _token(token: Token | None) -> str:
    return "none" if token is None else f"{token.id} {token.text!r}"


def _adapter(view: AdapterView) -> list[tuple[str, str]]:
    from fwdllama.formats import size

    ranks = ", ".join(map(str, view.ranks))
    scope = "the whole text" if view.scope == "all" else f"from tokens {', '.join(map(str, view.invocation_tokens))} on"
    layers = f"{len(view.layers)} layers, {view.layers[0]} to {view.layers[-1]}" if view.layers else "no layer"
    return [
        ("adapter", f"LoRA of rank {ranks}, alpha {view.alpha:g}"),
        ("architecture", view.architecture),
        ("file", f"{size(view.size_bytes)}, {view.n_parameters:,} parameters"),
        ("adapts", f"{', '.join(view.modules)} in {layers}"),
        ("scope", scope),
        *((f"base {key.rpartition('.')[2]}", _short(value)) for key, value in view.base.items()),
        *((key, _short(value)) for key, value in view.metadata.items()),
    ]


def _short(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= MOST_METADATA else f"{line[: MOST_METADATA - 3]}..."
