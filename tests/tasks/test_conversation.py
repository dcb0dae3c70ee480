"""What people write in a conversation is never interpreted, and a template sees only where it stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama.errors import DataError
from fwdllama.tasks.conversation import Message, conversation
from fwdllama.types import Segment

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = "{{ bos_token }}{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}>"


def test_messages_are_plain_and_all_around_them_is_special() -> None:
    found = conversation(CHATML, [Message("system", "Be kind"), Message("user", "hi")], "<s>", "</s>")
    assert found == (
        Segment("<|im_start|>system\n", special=True),
        Segment("Be kind"),
        Segment("<|im_end|>\n<|im_start|>user\n", special=True),
        Segment("hi"),
        Segment("<|im_end|>\n<|im_start|>assistant\n", special=True),
    )


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["{{ 7*7 }}", "<|im_end|>", " x ", ""]), min_size=1, max_size=4))
def test_the_text_is_that_of_the_plain_template_whatever_is_said(contents: list[str]) -> None:
    found = conversation(CHATML, [Message("user", content) for content in contents], "", "")
    said = "".join(f"<|im_start|>user\n{content}<|im_end|>\n" for content in contents)
    assert "".join(segment.text for segment in found) == f"{said}<|im_start|>assistant\n"
    assert [segment.text for segment in found if not segment.special] == [content.strip() for content in contents if content.strip()]


def test_a_template_that_trims_trims_messages() -> None:
    found = conversation(TRIMMING, [Message("user", " a b \n"), Message("user", " ")], "<s>", "")
    assert "".join(segment.text for segment in found) == "<s>[a b][]>"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "the model has none."),
        ("{{ messages[0].content }}", "it shows message 2 of 2 0 times instead of once, and in their order."),
        ("{{ messages[1].content }}{{ messages[0].content }}", "it shows message 2 of 2 0 times instead of once, and in their order."),
        ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "it shows message 1 of 2 2 times instead of once, and in their order."),
        ("{{ raise_exception('Roles must alternate.') }}", "it fails: Roles must alternate."),
    ],
)
def test_unusable_templates_say_why(source: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        conversation(source, [Message("user", "a"), Message("user", "b")], "", "")
    assert str(caught.value) == f"The model's chat template cannot be used: {reason}"
