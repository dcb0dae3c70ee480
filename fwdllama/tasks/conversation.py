"""A model's own chat template: Jinja from its GGUF, rendered in a sandbox, and what is control text in the result.

A template is a program that came with a downloaded file, hence the sandbox. It never sees what people wrote: it is given a placeholder
for each message, and is split there, so that braces, Jinja code and control tokens in a message mean nothing.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fwdllama.errors import DataError
from fwdllama.types import Segment

# Chat templates may show today's date. Two runs must not differ by it, so it is always the one that Llama 3's shows
# where no date is to be had.
_TODAY = datetime.date(2024, 7, 26)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is what the template knows, such as `user`."""

    role: str
    content: str


def conversation(source: str, messages: Sequence[Message], bos_token: str, eos_token: str) -> tuple[Segment, ...]:
    """The prompt for the next answer: what the messages say is plain, all around it is special.

    Whitespace at a message's ends is given to the template, because many trim it.

    Raises:
        DataError: there is no template, it fails, as many do on roles that do not alternate, or it does not show each message once.
    """
    if not source.strip():
        raise unusable("the model has none")
    shown: list[dict[str, str]] = []
    marks: list[tuple[str, str]] = []  # (placeholder, what it stands for)
    for i, message in enumerate(messages):
        text = message.content.strip()
        before, _, after = message.content.partition(text) if text else (message.content, "", "")
        mark = placeholder(source, i) if text else ""
        if text:
            marks.append((mark, text))
        shown.append({"role": message.role, "content": f"{before}{mark}{after}"})
    rest = rendered(source, shown, bos_token, eos_token, add_generation_prompt=True)
    segments: list[Segment] = []
    for i, (mark, text) in enumerate(marks):
        if rest.count(mark) != 1:
            times = f"{rest.count(mark)} times instead of once, and in their order"
            raise unusable(f"it shows message {i + 1} of {len(messages)} {times}")
        around, _, rest = rest.partition(mark)
        segments += [Segment(around, special=True), Segment(text)]
    return tuple(segment for segment in (*segments, Segment(rest, special=True)) if segment.text)


def placeholder(source: str, index: int = 0) -> str:
    """Stands for a message: cannot occur in `source` by accident, is the same in every run, and survives trimming and escaping."""
    return f"message{index}x{hashlib.sha256(source.encode(errors='replace')).hexdigest()}"


def rendered(
    source: str, messages: Sequence[Mapping[str, str]], bos_token: str, eos_token: str, *, add_generation_prompt: bool
) -> str:
    """The text that a template makes of messages. Thinking, where the model has it, is off: the answer follows the generation prompt.

    Raises:
        DataError: it fails.
    """
    # the settings and names that chat templates are written for: those of Hugging Face transformers
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _TODAY.strftime}
    try:
        return environment.from_string(source).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            tools=None,
            documents=None,
            enable_thinking=False,
        )
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise unusable(f"it fails: {reason}") from error


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said; here it is merely what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The enclosed statements."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def unusable(reason: str) -> DataError:
    """Why a template cannot be used; whoever asked knows what to use instead."""
    return DataError(f"The model's chat template cannot be used: {reason}.")
