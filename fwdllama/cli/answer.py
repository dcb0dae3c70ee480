"""`fwdllama answer`: one question, answered by the base model and with the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fwdllama.cli import options as o
from fwdllama.errors import DataError, UsageError
from fwdllama.types import Example

QUESTION = "The question"


def _text(help: str) -> object:
    return o.option(QUESTION, f"{help}; @FILE reads it from a file.", metavar="TEXT")


def register(app: typer.Typer) -> None:
    """Add `answer`."""

    @app.command("answer", cls=o.Command)
    def answer_command(
        model: o.Model,
        adapter: Annotated[
            Path | None, o.option(o.FILES, "Adapter to answer with too, a GGUF file.", metavar="FILE.gguf")
        ] = None,
        context: Annotated[str | None, _text("Text that holds the answer")] = None,
        question: Annotated[str | None, _text("What is asked about --context")] = None,
        prompt: Annotated[str | None, _text("Instead: a prompt, for what learned from prompts and answers")] = None,
        text: Annotated[str | None, _text("Instead: a text to classify with --labels")] = None,
        labels: Annotated[str | None, o.option(QUESTION, "Label words to choose from.", metavar="WORD,WORD")] = None,
        template: Annotated[
            o.TemplateName | None, o.option(QUESTION, "How it is put.", "as the adapter was trained, else seed")
        ] = None,
        max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.", metavar="N")] = 32,
        threads: o.Threads = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    ) -> None:
        """Ask one question, with the adapter and without it."""
        kind, example = _example(context, question, prompt, text, labels)
        from fwdllama.answering import ask, choose_template, open_engine
        from fwdllama.models import resolve
        from gguf_tools.adapter import read_adapter

        path = resolve(model)
        chosen = template or "seed"
        if adapter is not None and template is None:
            chosen = "chat" if read_adapter(adapter).metadata.get("fwdllama.template") == "chat" else "seed"
        answers = {}
        with open_engine(path, adapter_path=adapter, batch=1, n_threads=threads) as engine:
            form = choose_template(engine, chosen, kind)
            for label, on in (("base", False), ("tuned", True)):
                if on and adapter is None:
                    continue
                engine.set_adapter(on)
                answers[label] = ask(engine, form, example, max_new_tokens=max_new_tokens)
        if as_json:
            typer.echo(json.dumps({"base": answers["base"], "tuned": answers.get("tuned")}, ensure_ascii=False))
            return
        lines = Table.grid(padding=(0, 2))
        for label, said in answers.items():
            lines.add_row(label, Text(said or "(no answer)"))
        Console().print(lines)


def _example(
    context: str | None, question: str | None, prompt: str | None, text: str | None, labels: str | None
) -> tuple[o.DataKind, Example]:
    """What is asked, and of which kind it is.

    Raises:
        UsageError: the options do not make one question.
    """
    given = [name for name, value in (("--question", question), ("--prompt", prompt), ("--text", text)) if value]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise UsageError(f"give --context with --question, or --prompt, or --text with --labels; this has {found}.")
    if (question is None) != (context is None):
        raise UsageError("--question and --context go together: the answer is looked for in the context.")
    if (text is None) != (labels is None):
        raise UsageError("--text and --labels go together: the answer is one of the label words.")
    if question is not None and context is not None:
        return "squad", Example("asked", {"context": _read(context), "question": _read(question)}, ())
    if prompt is not None:
        return "pairs", Example("asked", {"prompt": _read(prompt)}, ())
    words = tuple(word.strip() for word in (labels or "").split(","))
    if len(set(words)) < 2 or "" in words:
        raise UsageError(f"--labels is {labels!r}, but must be at least two words, such as World,Sports.")
    return "classification", Example("asked", {"text": _read(text or "")}, (), words)


def _read(given: str) -> str:
    """The text itself, or what is in the file that `@` names."""
    if not given.startswith("@"):
        return given.strip()
    path = Path(given[1:]).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}).") from error
