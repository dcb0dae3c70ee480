"""`tokenizer.json`: the two kinds of BPE that LLaMA models come with, recognised by what the file says, or refused.

Byte-level BPE (LLaMA 3, SmolLM) becomes llama.cpp's `gpt2` vocabulary. There a text is first cut by a regular expression that
GGUF cannot carry: llama.cpp has its own, by name. So the file's pre-tokenizer is compared with those whose name is known, and
the tests compare the two tokenisers for each. BPE with byte fallback (LLaMA 2) is a sentencepiece vocabulary in other words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from gguf_tools.errors import FileError

_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
_QWEN2 = _LLAMA3.replace("{1,3}", "")
# What cuts a text, in order, and whether a piece that is a token is left alone (ignore_merges): llama.cpp's name of both.
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
}
_SPACE = "▁"


@dataclass(frozen=True)
class BpeModel:
    """A vocabulary: tokens by id, and either the merges of byte-level BPE with the name of what cuts texts, or scores."""

    ids: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    pre: str
    scores: Mapping[str, float] | None = None
    add_space_prefix: bool | None = None
    warnings: tuple[str, ...] = ()


def read_bpe(path: Path, content: Mapping[str, Any]) -> BpeModel:
    """The BPE model in the content of a tokenizer.json.

    Raises:
        FileError: it is malformed, no BPE, or cuts or normalises texts in a way that llama.cpp lacks.
    """
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise FileError(f"{path}: the tokenizer's model is {kind!r:.80}, but only BPE is converted.")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise FileError(f"{path}: the tokenizer's {key} is {model[key]!r:.80}, which llama.cpp does not have.")
    ids = model.get("vocab")
    if not isinstance(ids, dict) or not ids or not all(type(i) is int and 0 <= i < 1 << 31 for i in ids.values()):
        raise FileError(f"{path}: the tokenizer's vocab must map tokens to their ids.")
    merges = _merges(path, model.get("merges"), ids)
    if model.get("byte_fallback"):
        return _sentencepiece_like(path, content, ids, merges)
    pre = _pre_tokenizer(path, content, bool(model.get("ignore_merges")))
    return BpeModel(ids, merges, pre)


def _merges(path: Path, merges: Any, ids: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
    """Pairs in order of rank; older files write a pair as one string."""
    if not isinstance(merges, list):
        raise FileError(f"{path}: the tokenizer's merges must be a list.")
    pairs = []
    for rank, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        whole = isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts)
        if not whole or " " in "".join(parts) or "".join(parts) not in ids:
            raise FileError(f"{path}: merge {rank} is {merge!r:.80}, but must be two parts of a token of the vocabulary.")
        pairs.append((parts[0], parts[1]))
    return tuple(pairs)


def _steps(path: Path, stage: Any, list_key: str) -> list[dict[str, Any]]:
    """The parts of a stage that may be absent, single or a Sequence."""
    if stage is None:
        return []
    if not isinstance(stage, dict):
        raise FileError(f"{path}: a stage of the tokenizer is {stage!r:.80}, but must be an object.")
    if stage.get("type") != "Sequence":
        return [stage]
    parts = stage.get(list_key)
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise FileError(f"{path}: a Sequence of the tokenizer must have a list of {list_key}.")
    return parts


def _pre_tokenizer(path: Path, content: Mapping[str, Any], ignore_merges: bool) -> str:
    """llama.cpp's name for how texts are cut."""
    if _steps(path, content.get("normalizer"), "normalizers"):
        raise FileError(f"{path}: the tokenizer normalises texts, which llama.cpp does not do for byte-level BPE.")
    cuts = []
    for part in _steps(path, content.get("pre_tokenizer"), "pretokenizers"):
        kind = part.get("type")
        pattern = part.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if kind == "ByteLevel" and not part.get("add_prefix_space", True):
            cuts += ["gpt2"] if part.get("use_regex", True) else []
        elif kind == "Digits" and part.get("individual_digits") is True:
            cuts.append("digits")
        elif kind == "Split" and isinstance(regex, str) and part.get("behavior") == "Isolated" and not part.get("invert"):
            cuts.append(regex)
        else:
            raise FileError(f"{path}: the pre-tokenizer {part!r:.160} is not one that llama.cpp is known to have.")
    name = _NAMES.get((tuple(cuts), ignore_merges))
    if name is None:
        raise FileError(
            f"{path}: the pre-tokenizer {' + '.join(cuts)[:200]!r} (ignore_merges {ignore_merges}) is not one that "
            f"llama.cpp is known to have; recognised are those of {', '.join(_NAMES.values())}."
        )
    return name


def _sentencepiece_like(
    path: Path, content: Mapping[str, Any], ids: Mapping[str, int], merges: tuple[tuple[str, str], ...]
) -> BpeModel:
    """Scores in place of merges: the earlier a token can be made, the higher.

    llama.cpp joins any two neighbours that make a token, best score first. That is the same as applying the merges by rank
    where every way of cutting a token in two is a merge, and a token's merges are neighbours in rank; both hold for what was
    made from a sentencepiece model.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    scores: dict[str, float] = {}
    last = None
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token in scores and token != last:
            raise _no_sentencepiece(path, token)
        scores.setdefault(token, -float(rank))
        last = token
    special = {str(added.get("content")) for added in content.get("added_tokens") or [] if isinstance(added, dict)}
    for token in ids:
        if len(token) > 1 and token not in special and not _is_byte(token):
            cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
            if any(cut not in ranks and cut[0] in ids and cut[1] in ids for cut in cuts):
                raise _no_sentencepiece(path, token)
    lacking = next((byte for byte in range(256) if f"<0x{byte:02X}>" not in ids), None)
    if lacking is not None:
        raise FileError(f"{path}: lacks the byte token <0x{lacking:02X}>, which llama.cpp needs for unknown characters.")
    for token in ids:
        scores.setdefault(token, -float(len(merges)))
    prefix, warnings = _space_prefix(path, content)
    return BpeModel(ids, merges, "default", scores, prefix, warnings)


def _no_sentencepiece(path: Path, token: str) -> FileError:
    return FileError(
        f"{path}: the merges that make {token!r:.80} are not those of a sentencepiece vocabulary, and llama.cpp would "
        "tokenise otherwise; put tokenizer.model into the folder if there is one."
    )


def _space_prefix(path: Path, content: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether a space goes before a text, with a warning; anything but that and writing spaces as ▁ is refused."""
    prefix = escaped = unless = False
    for step in _steps(path, content.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
            prefix = True
        elif step.get("type") == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == _SPACE:
            escaped = True
        else:
            raise FileError(f"{path}: the normalizer {step!r:.160} is not one that llama.cpp has for such vocabularies.")
    for step in _steps(path, content.get("pre_tokenizer"), "pretokenizers"):
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        # A text cut at its spaces gives other tokens where a token holds one inside.
        if step.get("type") != "Metaspace" or step.get("replacement") != _SPACE or step.get("split", True):
            raise FileError(f"{path}: the pre-tokenizer {step!r:.160} is not one that llama.cpp has for such vocabularies.")
        prefix, unless, escaped = prefix or scheme != "never", scheme != "never", True
    if not escaped:
        raise FileError(f"{path}: the tokenizer does not write spaces as {_SPACE}, which llama.cpp does for such vocabularies.")
    if not unless:
        return prefix, ()
    return prefix, (
        "a text that begins with a space gets one more before it, as with sentencepiece but not with this tokenizer.json; "
        "put tokenizer.model into the folder if there is one.",
    )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def token_types(model: BpeModel) -> dict[str, TokenType]:
    """The type of each token, before it is known which ones are special."""
    fallback = model.scores is not None
    return {text: TokenType.BYTE if fallback and _is_byte(text) else TokenType.NORMAL for text in model.ids}
