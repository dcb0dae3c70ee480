"""A progress bar on stderr, for work that is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with how much is done, of how much; shown on a terminal only, and gone at the end."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as display:
        task = display.add_task(text, total=None)

        def report(done: int, total: int) -> None:
            display.update(task, completed=done, total=total)

        yield report
