from __future__ import annotations

import io

from rich.console import Console

from fwdllama.cli.scores import Scores, chosen, side_by_side, table
from fwdllama.types import Dataset, Example


def made(rows: list[tuple[str, str, str]]) -> Scores:
    """Questions as (paragraph, base answer, tuned answer), the right one being "right"."""
    examples = tuple(
        Example(str(i), {"context": c, "question": f"q{i}"}, ("right",)) for i, (c, _, _) in enumerate(rows)
    )
    base = {str(i): said for i, (_, said, _) in enumerate(rows)}
    tuned = {str(i): said for i, (_, _, said) in enumerate(rows)}
    dataset = Dataset("squad", examples, "some/dev.json")
    return Scores(dataset, {"f1": 10.0}, {"f1": 30.0}, base, tuned, {})


def shown(scores: Scores, n: int) -> list[str]:
    return [pair.question for pair in chosen(scores, n)]


def test_improved_answers_of_different_paragraphs_come_first_and_one_still_wrong_last() -> None:
    scores = made(
        [
            ("a", "right", "right"),
            ("a", "wrong", "right"),
            ("a", "wrong", "right"),
            ("b", "wrong", "wrong"),
            ("b", "right", "wrong"),
            ("c", "wrong", "right"),
        ]
    )
    assert shown(scores, 4) == ["q1", "q5", "q2", "q3"]
    assert shown(scores, 5) == ["q1", "q5", "q2", "q0", "q3"]


def test_where_nothing_is_wrong_no_wrong_answer_is_shown_and_no_question_twice() -> None:
    scores = made([("a", "wrong", "right"), ("b", "right", "right")])
    assert shown(scores, 5) == ["q0", "q1"]
    everything = made([("a", "wrong", "wrong")] * 3)
    assert sorted(shown(everything, 3)) == ["q0", "q1", "q2"]


def test_brackets_in_an_answer_are_shown_as_they_are() -> None:
    scores = made([("a", "[bold]x[/bold] [/]", "[red]right")])
    console = Console(file=io.StringIO(), width=120)
    console.print(side_by_side(chosen(scores)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]x[/bold] [/]" in text
    assert "[red]right" in text


def test_table_shows_before_after_and_change() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(table(made([("a", "wrong", "right")])))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for piece in ("1 questions of dev.json", "F1 (%)", "10.0", "30.0", "+20.0"):
        assert piece in text
