"""Prompts as tokens: raw text as it stands, token ids, or a conversation through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence

from fwdllama.encode import segment_tokens, spelling
from fwdllama.errors import DataError
from fwdllama.llama.model import Model
from fwdllama.tasks.conversation import Message, conversation


def raw_tokens(model: Model, prompt: str | Sequence[int]) -> tuple[int, ...]:
    """Tokens of a raw prompt, with the model's BOS where it wants one and there is none.

    A raw prompt is the program's own text, as it is for llama-server: control tokens that it spells are control tokens.
    Token ids are taken as they are.

    Raises:
        DataError: it is empty, or a number is no token of the model.
    """
    if not isinstance(prompt, str):
        wrong = next((token for token in prompt if not 0 <= token < model.n_vocab), None)
        if wrong is not None:
            raise DataError(f"the prompt has token {wrong}, but the model's are 0 to {model.n_vocab - 1}.")
        tokens = list(prompt)
    else:
        tokens = model.tokenize(prompt, special=True)
        if model.adds_bos and tokens[:1] != [model.bos]:
            tokens.insert(0, model.bos)
    if not tokens:
        raise DataError("the prompt is empty.")
    return tuple(tokens)


def chat_tokens(model: Model, messages: Sequence[Message]) -> tuple[int, ...]:
    """Tokens of a conversation, up to where the next answer begins; control tokens that a message spells stay text.

    Raises:
        DataError: the model has no chat template, or it refuses these messages.
    """
    bos, end = (spelling(model, token) for token in (model.info.bos_token, model.info.eos_token))
    segments = conversation(model.info.chat_template or "", messages, bos, end)
    tokens = segment_tokens(model, segments)
    begins_with_bos = bool(bos) and bool(segments) and segments[0].special and segments[0].text.startswith(bos)
    return tuple([model.bos, *tokens] if model.adds_bos and not begins_with_bos else tokens)


def text_of(model: Model, tokens: Sequence[int]) -> str:
    """What tokens spell; control tokens spell nothing."""
    return b"".join(model.piece(token) for token in tokens).decode(errors="replace")
