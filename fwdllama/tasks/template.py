"""How an example becomes the text that the model sees, and how what it generates becomes an answer.

`seed` is plain text and works with every model; `chat` is the conversation that the model was tuned on. Both split
into a prompt and an `invocation`: in scope `answer` the adapter is off in the first and on from the second. A user's
own text is only ever concatenated and never special, so braces, Jinja code and control tokens in it mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fwdllama.errors import DataError
from fwdllama.score import normalise
from fwdllama.tasks import Kind
from fwdllama.tasks.conversation import placeholder, rendered, unusable
from fwdllama.types import Example, Segment

NO_ANSWER = "unanswerable"


class _Marker(NamedTuple):
    """Around an answer or a label of the seed template: the end of the prompt, the invocation, from which an adapter of scope `answer` is on,
    what the model writes before the answer, and what ends it, None: the model's own token for that.
    """

    before: str
    invocation: str
    lead: str = ""
    end: str | None = None


# What an adapter adds at each token of the invocation helps to look the answer up, but each costs every probe: of the lengths that are not told
# apart a short one, and for labels, whose probes have no other tokens, all (LOG.md).
#
# An answer to a question stands in the context, where nearly every word has a space before it and is another token with it than without: on the
# line of its marker, behind a space, it can be copied (6 points of F1; LOG.md). It is one line, and in plain text every model expects a newline
# behind it: SmolLM2-135M-Instruct at 2.6 nats, its end token at 9.7, and to learn that one is to hold up a large slope that every probe disturbs.
# Other answers may have lines.
_SEED_MARKERS: Mapping[Kind, _Marker] = {
    "squad": _Marker("\n\n###", " Answer:", lead=" ", end="\n"),
    "pairs": _Marker("\n\n### Answer", ":\n"),
    "classification": _Marker("", "\n\n### Label:\n"),
}


@dataclass(frozen=True)
class Template:
    """A prompt is `before`, the example's content and `after`; the answer follows `invocation` and `lead`, which the model writes itself.

    `bos` says that the prompt already begins with the model's BOS token, as many chat templates do; whoever turns it
    into tokens must not add another, although the vocabulary may ask for one. `end` is the text that ends an answer, None
    the model's own token for that.
    """

    name: Literal["seed", "chat"]
    kind: Kind
    invocation: tuple[Segment, ...]
    before: tuple[Segment, ...] = ()
    after: tuple[Segment, ...] = ()
    bos: bool = False
    lead: str = ""
    end: str | None = None
    no_answer: str = NO_ANSWER

    def render(self, example: Example) -> tuple[Segment, ...]:
        """The prompt, up to the invocation."""
        content = _seed_content if self.name == "seed" else _chat_content
        return (*self.before, Segment(content(self.kind, example.fields, example.choices)), *self.after)

    def target(self, example: Example) -> str:
        """The text trained on: the first answer, or `no_answer` where a SQuAD v2.0 question has none.

        Raises:
            DataError: an example of another kind has no answer.
        """
        if example.answers:
            return example.answers[0].strip()
        if self.kind == "squad":
            return self.no_answer
        raise DataError(f"Example {example.id!r} has no answer to train on.")

    def parse(self, generated: str, example: Example) -> str:
        """The answer in a generated text: its first line, or the empty string for `no_answer`.

        Models go on after an answer, so later lines are dropped, unless a reference has several lines itself.
        """
        text = generated.strip()
        if not any("\n" in answer.strip() for answer in example.answers):
            text = text.partition("\n")[0].rstrip()
        if self.kind == "squad" and normalise(text) == normalise(self.no_answer):
            return ""
        return text


def seed_template(kind: Kind) -> Template:
    """The plain text template, for any model.

    >>> template = seed_template("pairs")
    >>> template.render(Example("1", {"prompt": "Say {hi}"}, ("hi",)))
    (Segment(text='Say {hi}\\n\\n### Answer', special=False),)
    >>> template.invocation
    (Segment(text=':\\n', special=False),)
    """
    marker = _SEED_MARKERS[kind]
    return Template("seed", kind, (Segment(marker.invocation),), lead=marker.lead, end=marker.end)


def chat_template(source: str, kind: Kind, bos_token: str, eos_token: str) -> Template:
    """The template of a model's own conversations, from the Jinja `source` in its GGUF (`tokenizer.chat_template`).

    It is rendered once, with a placeholder for the user's message, and split there: all around it is special. The
    invocation is what `add_generation_prompt` appends.

    Raises:
        DataError: there is no source, it fails, or it cannot be split so; each message recommends the seed template.
    """
    try:
        return _split(source, kind, bos_token, eos_token)
    except DataError as error:
        raise DataError(f"{error} Use the seed template instead.") from error


def _split(source: str, kind: Kind, bos_token: str, eos_token: str) -> Template:
    if not source.strip():
        raise unusable("the model has none")
    mark = placeholder(source)
    asked = [{"role": "user", "content": mark}]
    prompt = rendered(source, asked, bos_token, eos_token, add_generation_prompt=False)
    prompt_and_invocation = rendered(source, asked, bos_token, eos_token, add_generation_prompt=True)
    if prompt.count(mark) != 1:
        raise unusable(f"it shows a user's message {prompt.count(mark)} times instead of once")
    if not prompt_and_invocation.startswith(prompt):
        prompt = prompt.removesuffix(eos_token)  # Phi 3's template adds it where it is not to go on
    if not prompt_and_invocation.startswith(prompt):
        raise unusable("its generation prompt changes what stands before it")
    invocation = prompt_and_invocation.removeprefix(prompt)
    if not invocation:
        raise unusable("it adds no generation prompt, from which the adapter could be on")
    before, _, after = prompt.partition(mark)
    return Template(
        "chat",
        kind,
        invocation=(Segment(invocation, special=True),),
        before=_special(before),
        after=_special(after),
        bos=bool(bos_token) and before.startswith(bos_token),
    )


def _special(text: str) -> tuple[Segment, ...]:
    return (Segment(text, special=True),) if text else ()


def _seed_content(kind: Kind, fields: Mapping[str, str], choices: tuple[str, ...]) -> str:
    # an f-string inserts values as they are: braces in a user's text stay braces
    end = _SEED_MARKERS[kind].before
    if kind == "squad":
        return f"### Context:\n{fields['context']}\n\n### Question:\n{fields['question']}{end}"
    if kind == "pairs":
        return f"{fields['prompt']}{end}"
    return f"### Text:\n{fields['text']}{end}"


def _chat_content(kind: Kind, fields: Mapping[str, str], choices: tuple[str, ...]) -> str:
    """The same as a request; an instructed model is told what form of answer counts."""
    if kind == "squad":
        request = "Answer the question with a few words copied from the text."
        return f"{request}\n\nText: {fields['context']}\n\nQuestion: {fields['question']}"
    if kind == "pairs":
        return fields["prompt"]
    return f"Which label fits the text: {', '.join(choices)}? Answer with the label only.\n\nText: {fields['text']}"
