"""Examples as tokens of one model.

Prompt, invocation and target are tokenised apart on purpose: the adapter of scope `answer` is switched on between the
first two, so a token must end there, whereas some vocabularies would merge the newlines on both sides into one. Within
each part the tokens are those that an ordinary runtime gives the whole text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fwdllama.errors import DataError
from fwdllama.llama.binding import llama
from fwdllama.llama.model import Tokenizer
from fwdllama.tasks import Kind
from fwdllama.tasks.template import Template, chat_template, seed_template
from fwdllama.types import Dataset, Encoded, Example, Segment


@dataclass(frozen=True)
class EncodedDataset:
    """What of a data set can be used with one model; `sources[i]` is the example that `examples[i]` was made from.

    `skipped` counts what was left out, by reason; `file` is where the data came from, for messages.
    """

    examples: tuple[Encoded, ...]
    sources: tuple[Example, ...]
    skipped: dict[str, int] = field(default_factory=dict)
    file: str = ""

    def within(self, n_ctx_seq: int) -> EncodedDataset:
        """The examples whose prompt, invocation and target fit `n_ctx_seq` tokens; the others are counted in `skipped`.

        Raises:
            DataError: none fits.
        """
        skipped = Counter(self.skipped)
        kept = []
        for i, example in enumerate(self.examples):
            if len(example.prompt) + len(example.invocation) > n_ctx_seq:
                skipped[f"prompt longer than the context of {n_ctx_seq} tokens"] += 1
            elif example.n_tokens > n_ctx_seq:
                skipped[f"prompt and answer longer than the context of {n_ctx_seq} tokens"] += 1
            else:
                kept.append(i)
        if not kept:
            shortest = min((example.n_tokens for example in self.examples), default=0)
            raise DataError(
                f"{self.file}: none of its {len(self.examples)} examples fits the context of {n_ctx_seq} tokens; "
                f"the shortest needs {shortest} with its answer. Use a larger --ctx."
            )
        return EncodedDataset(
            tuple(self.examples[i] for i in kept), tuple(self.sources[i] for i in kept), dict(skipped), self.file
        )


class Encoder:
    """Turns examples into tokens with one model and template; what they share is tokenised once."""

    def __init__(self, model: Tokenizer, template: Template) -> None:
        self.model, self.template = model, template
        self.invocation = invocation_tokens(model, template)
        self._bos = (model.bos,) if model.adds_bos and not template.bos else ()
        self._end = _ending(model, template)
        self._choices: dict[tuple[str, ...], tuple[int, ...]] = {}

    def question(self, example: Example) -> Encoded:
        """The prompt and what may follow it, without a target: for an example whose answer is not known."""
        return Encoded(example.id, self._prompt(example), self.invocation, (), self._choice_tokens(example.choices))

    def example(self, example: Example) -> Encoded:
        """The example with its target: the first answer and its end, or the right label word's first token.

        The end is the template's, or the token for that of a text or, with a chat template, of a turn.

        Raises:
            DataError: it has no answer, or two label words cannot be told apart.
        """
        choices = self._choice_tokens(example.choices)
        target = (choices[example.choices.index(self.template.target(example))],) if choices else self._target(example)
        return Encoded(example.id, self._prompt(example), self.invocation, target, choices)

    def _target(self, example: Example) -> tuple[int, ...]:
        return (*self._behind_invocation(self.template.lead + self.template.target(example)), *self._end)

    def targets(self, example: Example) -> tuple[int, ...]:
        """The tokens that a loss of the example looks at: its target, or all label words.

        Raises:
            DataError: as for `example`.
        """
        return self._choice_tokens(example.choices) or self._target(example)

    def _prompt(self, example: Example) -> tuple[int, ...]:
        """Its tokens in front of the invocation, which has all its tokens to itself: where these two would share one, they are tokenised apart."""
        rendered = self.template.render(example)
        whole, n = segment_tokens(self.model, (*rendered, *self.template.invocation)), len(self.invocation)
        tokens = whole[:-n] if tuple(whole[-n:]) == self.invocation else segment_tokens(self.model, rendered)
        return (*self._bos, *tokens)

    def _behind_invocation(self, text: str) -> list[int]:
        last = self.template.invocation[-1].text[-1:]
        return _behind(self.model, last, text) if last == "\n" or self.template.lead else self.model.tokenize(text)

    def _choice_tokens(self, words: tuple[str, ...]) -> tuple[int, ...]:
        if words not in self._choices:
            first: dict[int, str] = {}
            for word in words:
                token = self._behind_invocation(word)[0]
                if token in first:
                    piece = self.model.piece(token).decode(errors="replace")
                    raise DataError(
                        f"the label words {first[token]!r} and {word!r} begin with the same token {piece!r} of "
                        f"{self.model.info.path}, so the model cannot tell them apart; choose others with --labels."
                    )
                first[token] = word
            self._choices[words] = tuple(first)
        return self._choices[words]


def encode_dataset(model: Tokenizer, dataset: Dataset, template: Template, *, n_ctx_seq: int | None) -> EncodedDataset:
    """Every example as tokens, less those that do not fit `n_ctx_seq` (None: all are kept).

    Raises:
        DataError: nothing fits, an example has no answer, or two label words cannot be told apart.
    """
    encoder = Encoder(model, template)
    encoded = EncodedDataset(
        tuple(encoder.example(example) for example in dataset.examples), dataset.examples, {}, dataset.source
    )
    return encoded if n_ctx_seq is None else encoded.within(n_ctx_seq)


def segment_tokens(model: Tokenizer, segments: Sequence[Segment]) -> list[int]:
    """Tokens of a prompt, without BOS: as a whole, as an ordinary runtime would, but what spells control tokens in plain segments stays text."""
    text = "".join(segment.text for segment in segments)
    if not any(segment.special for segment in segments):
        return model.tokenize(text)
    tokens = model.tokenize(text, special=True)
    own = [token for segment in segments if segment.special for token in model.tokenize(segment.text, special=True)]
    if list(filter(model.is_control, tokens)) != list(filter(model.is_control, own)):
        return model.encode(tuple(segments))
    return tokens


def invocation_tokens(model: Tokenizer, template: Template) -> tuple[int, ...]:
    """The tokens from which the adapter of scope `answer` is on.

    They are the same behind whatever text. Some vocabularies (Llama 3's) have tokens of a question mark and the newlines behind it; there the
    invocation begins behind its newlines, so that a server that is given a prompt as one text finds it.
    """
    return tuple(_invocation(model, template.invocation))


def _invocation(model: Tokenizer, segments: tuple[Segment, ...]) -> Iterator[int]:
    for segment in segments:
        text = segment.text
        if text.startswith("\n") and not segment.special:
            asked, whole = model.tokenize("a?"), model.tokenize("a?" + text)
            if whole[: len(asked)] == asked:
                yield from whole[len(asked) :]
                continue
            text = text.lstrip("\n")
        yield from _behind(model, "\n", text, special=segment.special)


def _ending(model: Tokenizer, template: Template) -> tuple[int, ...]:
    if template.end is not None:
        return tuple(_behind(model, "\n", template.end))
    return (model.end_of_turn if template.name == "chat" else model.end,)


def _behind(model: Tokenizer, mark: str, text: str, *, special: bool = False) -> list[int]:
    """Tokens of `text` as they are behind `mark`, a newline or colon, or as they are at the beginning where the mark would merge in.

    SentencePiece puts a space before the beginning of every text that it is given; there is none inside a text.
    """
    before = model.tokenize(mark)
    whole = model.tokenize(mark + text, special=special)
    n = len(before)
    return whole[n:] if whole[:n] == before else model.tokenize(text, special=special)


def model_template(model: Tokenizer, name: Literal["seed", "chat"], kind: Kind) -> Template:
    """The seed template, or the one of the model's own conversations.

    Raises:
        DataError: the model has no chat template, or one that cannot be used.
    """
    if name == "seed":
        return seed_template(kind)
    return chat_template(
        model.info.chat_template or "",
        kind,
        spelling(model, model.info.bos_token),
        spelling(model, model.info.eos_token),
    )


def spelling(model: Tokenizer, token: int | None) -> str:
    """How a chat template writes a control token; `Model.piece` has no text for those."""
    if token is None:
        return ""
    text: bytes = llama().llama_vocab_get_text(model.vocab, token)
    return text.decode(errors="replace")


def longest(examples: Sequence[Encoded], max_new_tokens: int) -> int:
    """Cells that the longest example occupies with its target, or with `max_new_tokens` of a generated answer."""
    return max(len(e.prompt) + len(e.invocation) + max(len(e.target), max_new_tokens) for e in examples)
