"""`tokenizer.model` of sentencepiece, read without its library, which has no wheel for every platform we run on.

The file is a protobuf message; the few fields that matter here are read, the others are skipped. Field numbers are those of
sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import TokenType

from gguf_tools.document import read_bytes
from gguf_tools.errors import FileError

_MAX_BYTES = 1 << 26
_MAX_PIECES = 1 << 22
_BPE = 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class SentencePieceModel:
    """A BPE vocabulary: (text, score, type) by id, the special ids that exist, and whether a space goes before a text."""

    pieces: tuple[tuple[str, float, TokenType], ...]
    token_ids: dict[str, int]
    add_space_prefix: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a vocabulary that llama.cpp tokenises with exactly as sentencepiece does.

    Raises:
        FileError: it is no sentencepiece model, or one whose algorithm or normalisation llama.cpp lacks.
    """
    label = str(path)
    data = memoryview(read_bytes(path, _MAX_BYTES))
    pieces: list[tuple[str, float, TokenType]] = []
    trainer = {"model_type": 1, "byte_fallback": 0, "unk": 0, "bos": 1, "eos": 2, "pad": -1, "suffix": 0}
    normalizer: dict[str, int] = {"charsmap": 0, "dummy_prefix": 1, "remove_extra": 1, "escape": 1}
    numbers = {3: "model_type", 24: "suffix", 35: "byte_fallback", 40: "unk", 41: "bos", 42: "eos", 43: "pad"}
    for field, value in _fields(data, label):
        if field == 1 and isinstance(value, memoryview):
            pieces.append(_piece(value, label, len(pieces)))
            if len(pieces) > _MAX_PIECES:
                raise FileError(f"{label}: has more than {_MAX_PIECES} pieces.")
        elif field == 2 and isinstance(value, memoryview):
            trainer.update({numbers[n]: _signed(v) for n, v in _fields(value, label) if n in numbers and isinstance(v, int)})
        elif field == 3 and isinstance(value, memoryview):
            for n, v in _fields(value, label):
                if n == 2 and isinstance(v, memoryview):
                    normalizer["charsmap"] = len(v)
                elif n in (3, 4, 5) and isinstance(v, int):
                    normalizer[("dummy_prefix", "remove_extra", "escape")[n - 3]] = v
    if not pieces:
        raise FileError(f"{label}: is no sentencepiece model: it has no pieces.")
    _check(label, pieces, trainer, normalizer)
    ids = {kind: trainer[kind] for kind in ("unk", "bos", "eos", "pad") if 0 <= trainer[kind] < len(pieces)}
    return SentencePieceModel(tuple(pieces), ids, bool(normalizer["dummy_prefix"]))


def _check(
    label: str, pieces: list[tuple[str, float, TokenType]], trainer: dict[str, int], normalizer: dict[str, int]
) -> None:
    """Refuse what llama.cpp would tokenise otherwise, or abort on."""
    if trainer["model_type"] != _BPE:
        name = {1: "unigram", 3: "word", 4: "char"}.get(trainer["model_type"], str(trainer["model_type"]))
        raise FileError(f"{label}: is a sentencepiece model of type {name}, but LLaMA's type, bpe, is converted.")
    n_bytes = sum(kind == TokenType.BYTE for _, _, kind in pieces)
    if not trainer["byte_fallback"] or n_bytes != 256:
        raise FileError(f"{label}: has {n_bytes} byte pieces, but llama.cpp needs byte_fallback with all 256.")
    for key, what in (("charsmap", "normalises texts by a character map"), ("remove_extra", "removes extra spaces"),
                      ("suffix", "puts spaces at the end of words")):  # fmt: skip
        if (trainer | normalizer)[key]:
            raise FileError(f"{label}: {what}, which llama.cpp does not do for such vocabularies.")
    if not normalizer["escape"]:
        raise FileError(f"{label}: does not escape spaces, which llama.cpp always does for such vocabularies.")


def _piece(data: memoryview, label: str, index: int) -> tuple[str, float, TokenType]:
    text, score, kind = "", 0.0, TokenType.NORMAL
    for field, value in _fields(data, label):
        if field == 1 and isinstance(value, memoryview):
            try:
                text = bytes(value).decode("utf-8")
            except UnicodeDecodeError:
                raise FileError(f"{label}: piece {index} is not UTF-8.") from None
        elif field == 2 and isinstance(value, float):
            score = value
        elif field == 3 and isinstance(value, int):
            try:
                kind = TokenType(value)  # GGUF numbers them as sentencepiece does
            except ValueError:
                raise FileError(f"{label}: piece {index} is of type {value}, which is unknown.") from None
    if not text or not abs(score) < 3.4e38:
        raise FileError(f"{label}: piece {index} is {text!r:.80} with score {score}, but must have a text and a finite score.")
    return text, score, kind


def _fields(data: memoryview, label: str) -> Iterator[tuple[int, int | float | memoryview]]:
    """The fields of a protobuf message: integers, 32-bit floats and nested bytes; 64-bit ones are passed over."""
    at, end = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise FileError(f"{label}: is no sentencepiece model, or truncated (at byte {at} of a message of {end}).")

    while at < end:
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            raise FileError(f"{label}: is no sentencepiece model (wire type {wire} at byte {at} of a message of {end}).")
        size = varint() if wire == 2 else 8 if wire == 1 else 4
        if size > end - at:
            raise FileError(f"{label}: is no sentencepiece model, or truncated (at byte {at} of a message of {end}).")
        start, at = at, at + size
        if wire == 2:
            yield tag >> 3, data[start:at]
        elif wire == 5:
            (number,) = struct.unpack_from("<f", data, start)
            yield tag >> 3, float(number)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
