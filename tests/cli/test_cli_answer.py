from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Run

SHORT = ("--threads", 1, "--max-new-tokens", 4)


def test_a_question_is_answered_with_the_adapter_and_without(run: Run, model: Path, adapter: Path) -> None:
    asked = ("answer", "--model", model, "--context", "abc def", "--question", "abc?", *SHORT)
    base = run(*asked, "--json")
    assert base.json["tuned"] is None
    both = run(*asked, "--adapter", adapter, "--json")
    assert both.code == 0
    assert both.json["base"] == base.json["base"]
    assert isinstance(both.json["tuned"], str)
    shown = run(*asked, "--adapter", adapter)
    assert [line.split()[0] for line in shown.out.splitlines()] == ["base", "tuned"]
    assert shown.err == ""


def test_texts_can_come_from_files(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("abc def\n")
    said = [
        run("answer", "--model", model, "--context", context, "--question", "abc?", "--json", *SHORT).json
        for context in ("abc def", "@c.txt")
    ]
    assert said[0] == said[1]


def test_a_prompt_and_a_text_to_classify_are_answered(run: Run, model: Path) -> None:
    assert run("answer", "--model", model, "--prompt", "say hi", *SHORT).code == 0
    result = run("answer", "--model", model, "--text", "some news", "--labels", "World,Sports", "--json", *SHORT)
    assert result.json["base"] in ("World", "Sports")


def test_an_adapter_of_another_template_than_asked_is_a_warning(run: Run, model: Path, adapter: Path) -> None:
    asked = ("answer", "--model", model, "--adapter", adapter, "--context", "abc", "--question", "abc?", *SHORT)
    assert "another template" in run(*asked, "--template", "chat").err
    assert run(*asked).err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "give --context with --question, or --prompt, or --text with --labels; this has none of them."),
        (["--prompt", "a", "--text", "b"], 2, "; this has --prompt and --text."),
        (["--question", "q"], 2, "--question and --context go together: the answer is looked for in the context."),
        (["--prompt", "q", "--context", "c"], 2, "--question and --context go together"),
        (["--text", "t"], 2, "--text and --labels go together: the answer is one of the label words."),
        (["--text", "t", "--labels", "a"], 2, "--labels is 'a', but must be at least two words, such as World,Sports."),
        (["--context", "@absent", "--question", "q"], 1, "absent: cannot be read: No such file or directory."),
        (["--context", "abc " * 3000, "--question", "q"], 1, "2048"),
    ],
)
def test_what_is_no_question_is_refused(run: Run, model: Path, arguments: list[str], code: int, sentence: str) -> None:
    result = run("answer", "--model", model, *arguments)
    assert result.code == code
    assert sentence in result.error
    assert result.out == ""
