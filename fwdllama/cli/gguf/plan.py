"""`fwdllama gguf plan`: what evaluating and training will hold in memory, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwdllama.cli import budget
from fwdllama.errors import UsageError
from fwdllama.formats import size

if TYPE_CHECKING:
    from fwdllama.memory import Plan
    from fwdllama.setting import Setting, Task
    from gguf_tools.model import ModelInfo

TASKS: tuple[Task, ...] = ("eval", "train")
PHONES = ("8GB", "6GB")


def register(group: typer.Typer) -> None:
    """Add `plan`."""

    @group.command("plan")
    def plan_command(
        model: Annotated[str, typer.Argument(help="Base model: a name such as smollm2-135m, or the path of a GGUF file.")],
        ctx: Annotated[
            int | None,
            typer.Option(min=32, help="Tokens of an example; default: 1024 to evaluate, 256 to train.", metavar="N"),
        ] = None,
        batch: Annotated[
            int, typer.Option(min=1, max=40, help="Questions answered at a time; in training, paragraphs held at once.", metavar="N")
        ] = 8,
        held_out: Annotated[int, typer.Option(min=1, help="Examples that training watches.", metavar="N")] = 32,
        scope: Annotated[str, typer.Option(help="Where the adapter is on: answer or all.")] = "answer",
        from_layer: Annotated[
            int | None, typer.Option(min=0, help="First trained layer; default: a third of the depth.", metavar="N")
        ] = None,
        kv: Annotated[str, typer.Option("--kv", "--kv-type", help="Type of the KV cache.", metavar="TYPE")] = "f16",
        mmap: Annotated[bool, typer.Option(help="Map the model's file instead of reading it.")] = False,
        repack: Annotated[bool, typer.Option(help="Rearrange the weights for this CPU.")] = True,
        stage_layers: Annotated[
            int | None, typer.Option(min=1, help="Training staged, so many of the lower layers in memory at a time.", metavar="N")
        ] = None,
        memory: Annotated[
            list[str] | None,
            typer.Option(help="What must be enough; several times for several. Default: this machine's, 8GB and 6GB.", metavar="SIZE"),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    ) -> None:
        """Peak memory of evaluating and of training a model, item by item, and the cheapest setting that fits.

        Only the file's header is read.
        """
        if scope not in ("answer", "all"):
            raise UsageError(f"--scope is {scope!r}, but must be answer or all.")
        limits = {text: budget.memory_size(text, "--memory") for text in memory or ()}
        from fwdllama.models import resolve
        from fwdllama.setting import Setting
        from gguf_tools.model import read_model_info

        info = read_model_info(resolve(model))
        asked = Setting(ctx, batch, held_out, "all" if scope == "all" else "answer", from_layer, kv, mmap, repack, stage_layers)
        if not limits:
            from fwdllama.machine import total_bytes

            limits = {"this machine": total_bytes(), **{text: budget.memory_size(text, "--memory") for text in PHONES}}
        found = planned(info, asked, limits)
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            show(found)


def planned(info: ModelInfo, asked: Setting, limits: dict[str, int]) -> dict[str, Any]:
    """Everything that the command prints, as plain values."""
    from fwdllama.machine import process_bytes
    from gguf_tools.plan import Item

    base = Item("Python, NumPy and llama.cpp's libraries", process_bytes())
    plans = {task: asked.plan(info, task).within(base) for task in TASKS}
    return {
        "model": str(info.path),
        "architecture": info.architecture,
        "quantisation": info.quantisation,
        "size_bytes": info.size_bytes,
        **{task: _as_json(plan) for task, plan in plans.items()},
        "fits": [
            {"memory": name, "memory_bytes": limit, **{task: _fit(info, asked, task, limit, base.size_bytes) for task in TASKS}}
            for name, limit in limits.items()
        ],
    }


def _as_json(plan: Plan) -> dict[str, Any]:
    return {
        "peak_bytes": plan.peak.total_bytes,
        "mapped_bytes": plan.peak.mapped_bytes,
        "peak_phase": plan.peak.name,
        "phases": [
            {
                "name": phase.name,
                "total_bytes": phase.total_bytes,
                "items": [{"name": i.name, "size_bytes": i.size_bytes, "mapped": i.mapped} for i in phase.items],
            }
            for phase in plan.phases
        ],
    }


def _fit(info: ModelInfo, asked: Setting, task: Task, limit: int, base_bytes: int) -> dict[str, Any]:
    """Whether a task fits, and the options that make it; where nothing does, those of the smallest setting."""
    from fwdllama.setting import cheapest, smallest

    found = cheapest(info, asked, task, limit, base_bytes)
    setting, plan = found or smallest(info, asked, task)
    return {
        "fits": found is not None,
        "options": setting.options(asked, info, task),
        "peak_bytes": base_bytes + plan.peak.total_bytes,
        "mapped_bytes": plan.peak.mapped_bytes,
    }


def show(found: dict[str, Any]) -> None:
    """Print it: a table of items for each task, then a line for each memory and task."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for task in TASKS:
        plan = found[task]
        lines = Table(title=f"fwdllama {task}: {size(plan['peak_bytes'])} at most, while {plan['peak_phase']}", title_justify="left", box=None)
        lines.add_column("item")
        lines.add_column("size", justify="right")
        for phase in plan["phases"]:
            if phase["name"] == plan["peak_phase"]:
                for item in phase["items"]:
                    lines.add_row(Text(item["name"]), size(item["size_bytes"]))
            else:
                lines.add_row(Text(f"(before: {phase['name']}, {size(phase['total_bytes'])} in all)", style="dim"), "")
        console.print(lines)
        console.print()
    for fit in found["fits"]:
        for task in TASKS:
            console.print(Text(sentence(fit, task)), soft_wrap=True)


def sentence(fit: dict[str, Any], task: Task) -> str:
    """Whether a task fits a memory, in words.

    >>> answer = {"fits": True, "options": ["--mmap"], "peak_bytes": 2**30, "mapped_bytes": 2**20}
    >>> sentence({"memory": "8GB", "memory_bytes": 2**33, "eval": answer}, "eval")
    'eval fits in 8GB: yes, with --mmap (1.0 GiB, of which 1.0 MiB can be read again from the file)'
    """
    answer = fit[task]
    name = fit["memory"] if fit["memory"] != "this machine" else f"this machine's {size(fit['memory_bytes'])}"
    taken = size(answer["peak_bytes"])
    if answer["mapped_bytes"]:
        taken += f", of which {size(answer['mapped_bytes'])} can be read again from the file"
    words = " ".join(answer["options"])
    if not answer["fits"]:
        return f"{task} fits in {name}: no; the smallest setting{f', {words},' if words else ''} needs {taken}"
    return f"{task} fits in {name}: yes, {f'with {words}' if words else 'as it is'} ({taken})"
