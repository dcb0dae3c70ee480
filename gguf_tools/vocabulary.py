"""The vocabulary of a Hugging Face model folder, as llama.cpp stores it.

`gguf.SpecialVocab` reads some of this, but warns about every LLaMA's template, needs files that not every folder has, and
raises what its look-ups happen to raise; so the few fields are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import TokenType

from gguf_tools.bpe import read_bpe, token_types
from gguf_tools.document import read_bytes, read_object_if_there
from gguf_tools.errors import FileError
from gguf_tools.sentencepiece import read_sentencepiece

_KINDS = ("bos", "eos", "unk", "pad")
_ADDED_SCORE = -1000.0  # below every real one: an added token is found in the text, never made by merging


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types and scores, and what begins and ends a text.

    `model` is llama.cpp's `llama` (sentencepiece) or `gpt2` (byte-level BPE, with `merges`). `warnings` say in what texts it
    differs from the original. Whether spaces around an added token belong to it cannot be expressed, and is left out.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] | None
    merges: tuple[tuple[str, str], ...]
    add_space_prefix: bool | None
    token_ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    warnings: tuple[str, ...] = ()

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Put everything into a GGUF file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
        if self.merges:
            writer.add_token_merges([" ".join(pair) for pair in self.merges])
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        for kind, token in self.token_ids.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


@dataclass
class _Table:
    """Tokens by id, while they are collected."""

    tokens: dict[int, tuple[str, float, TokenType]]

    def add(self, token: int, text: str, special: bool, path: Path) -> None:
        """Make `text` an added token; a control token is found in a text only where special tokens are looked for."""
        known = self.tokens.get(token)
        if known is not None and known[0] == text and known[2] in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE):
            return
        if not text or token < 0:
            raise FileError(f"{path}: the added token {text!r:.80} has id {token}, but must have a text and an id.")
        self.tokens[token] = text, _ADDED_SCORE, TokenType.CONTROL if special else TokenType.USER_DEFINED


def read_vocabulary(folder: Path, n_vocab: int, config_ids: Mapping[str, int]) -> Vocabulary:
    """Read `tokenizer.model`, or else `tokenizer.json`, and the special tokens and chat template beside it.

    The result has exactly `n_vocab` tokens, one for each row of the embeddings. `config_ids` are the special tokens that
    config.json names, used where the tokenizer names none.

    Raises:
        FileError: there is no tokenizer, or llama.cpp would tokenise otherwise than it.
    """
    settings = read_object_if_there(folder / "tokenizer_config.json")
    content = read_object_if_there(folder / "tokenizer.json")
    table = _Table({})
    model_ids: Mapping[str, int] = {}
    if (folder / "tokenizer.model").exists():
        path = folder / "tokenizer.model"
        spm = read_sentencepiece(path)
        table.tokens = dict(enumerate(spm.pieces))
        model_ids = spm.token_ids
        vocabulary = Vocabulary("llama", "default", (), (), (), (), spm.add_space_prefix, add_bos=True)
    elif content:
        path = folder / "tokenizer.json"
        bpe = read_bpe(path, content)
        types = token_types(bpe)
        for text, token in bpe.ids.items():
            if token in table.tokens:
                raise FileError(f"{path}: the tokens {table.tokens[token][0]!r:.60} and {text!r:.60} both have id {token}.")
            table.tokens[token] = text, bpe.scores[text] if bpe.scores else 0.0, types[text]
        spm_like = bpe.scores is not None
        vocabulary = Vocabulary("llama" if spm_like else "gpt2", bpe.pre, (), (), () if spm_like else None,
                                () if spm_like else bpe.merges, bpe.add_space_prefix, add_bos=spm_like,
                                warnings=bpe.warnings)  # fmt: skip
    else:
        raise FileError(f"{folder}: holds neither tokenizer.model nor tokenizer.json.")
    _add_tokens(table, folder, content, settings)
    vocabulary = _filled(vocabulary, table, n_vocab, path)
    return _finished(vocabulary, folder, content, settings, model_ids, config_ids)


def _add_tokens(table: _Table, folder: Path, content: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Tokens that were added to the vocabulary, from the three places where they are kept."""
    for text, token in read_object_if_there(folder / "added_tokens.json").items():
        if type(token) is not int:
            raise FileError(f"{folder / 'added_tokens.json'}: the id of {text!r:.80} is {token!r:.80}, but must be a number.")
        table.add(token, text, False, folder / "added_tokens.json")
    listed = content.get("added_tokens") or []
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, list) or not isinstance(decoder, dict):
        raise FileError(f"{folder}: added_tokens must be a list, and added_tokens_decoder an object.")
    for path, entries in (
        (folder / "tokenizer.json", [(entry.get("id") if isinstance(entry, dict) else None, entry) for entry in listed]),
        (folder / "tokenizer_config.json", [(int(i) if i.isdecimal() else None, entry) for i, entry in decoder.items()]),
    ):
        for token, entry in entries:
            if type(token) is not int or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                raise FileError(f"{path}: the added token {entry!r:.80} must have an id and a content.")
            table.add(token, entry["content"], entry.get("special") is True, path)


def _filled(vocabulary: Vocabulary, table: _Table, n_vocab: int, path: Path) -> Vocabulary:
    """One token for each embedding: unused ones where ids are missing, none where the model has no embedding."""
    beyond = {token: entry for token, entry in table.tokens.items() if token >= n_vocab}
    real = next((entry[0] for entry in beyond.values() if entry[1] != _ADDED_SCORE), None)
    if real is not None:
        raise FileError(f"{path}: has the token {real!r:.80} beyond the {n_vocab} that the model has embeddings for.")
    entries = [table.tokens.get(token, (f"[PAD{token}]", _ADDED_SCORE, TokenType.UNUSED)) for token in range(n_vocab)]
    texts = [entry[0] for entry in entries]
    if len(set(texts)) != n_vocab:  # llama.cpp aborts on it
        seen: set[str] = set()
        twice = next(text for text in texts if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise FileError(f"{path}: the token {twice!r:.80} occurs twice.")
    return replace(
        vocabulary,
        tokens=tuple(texts),
        types=tuple(entry[2] for entry in entries),
        scores=None if vocabulary.scores is None else tuple(entry[1] for entry in entries),
        warnings=vocabulary.warnings
        + tuple(f"the added token {entry[0]!r} was left out: the model has no embedding for it." for entry in beyond.values()),
    )


def _finished(
    vocabulary: Vocabulary,
    folder: Path,
    content: Mapping[str, Any],
    settings: Mapping[str, Any],
    model_ids: Mapping[str, int],
    config_ids: Mapping[str, int],
) -> Vocabulary:
    """Special tokens, whether a text gets them, and the chat template."""
    by_text = {text: token for token, text in enumerate(vocabulary.tokens)}
    ids: dict[str, int] = {}
    for kind in _KINDS:
        named = settings.get(f"{kind}_token")
        named = named.get("content") if isinstance(named, dict) else named
        found = by_text.get(named) if isinstance(named, str) else None
        for token in (found, config_ids.get(kind), model_ids.get(kind)):
            if token is not None and token < len(vocabulary.tokens):
                ids[kind] = token
                break
    if "eos" not in ids:  # llama.cpp would take a token that has nothing to do with it
        raise FileError(f"{folder}: neither tokenizer_config.json nor config.json names the token that ends a text (eos).")
    first, last = _template_ends(content)
    adds = {"bos": vocabulary.add_bos, "eos": False}
    for kind, text in (("bos", first), ("eos", last)):
        if content.get("post_processor"):
            adds[kind] = text is not None and by_text.get(text) == ids.get(kind)
        if isinstance(settings.get(f"add_{kind}_token"), bool):
            adds[kind] = settings[f"add_{kind}_token"]
        adds[kind] = adds[kind] and kind in ids
    template = _chat_template(folder, settings)
    return replace(vocabulary, token_ids=ids, add_bos=adds["bos"], add_eos=adds["eos"], chat_template=template)


def _template_ends(content: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The special tokens that tokenizer.json's template puts before and after a text."""
    processor = content.get("post_processor")
    parts = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    ends: list[str | None] = [None, None]
    for part in parts if isinstance(parts, list) else []:
        single = part.get("single") if isinstance(part, dict) and part.get("type") == "TemplateProcessing" else None
        if isinstance(single, list) and len(single) > 1:
            tokens = [item.get("SpecialToken") if isinstance(item, dict) else None for item in (single[0], single[-1])]
            ends = [token.get("id") if isinstance(token, dict) else None for token in tokens]
    first, last = (end if isinstance(end, str) else None for end in ends)
    return first, last


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """From its own file, which newer versions of transformers write and prefer, or from tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return read_bytes(path, 1 << 20).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"{path}: is not UTF-8 text (byte {error.start}).") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise FileError(f"{folder / 'tokenizer_config.json'}: chat_template must be a text, not {type(template).__name__}.")
    return template
