"""What a tokenizer's files say is understood, or refused where llama.cpp would do something else with it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_tools.convert import convert_model
from gguf_tools.errors import FileError
from gguf_tools.sentencepiece import read_sentencepiece
from gguf_tools.vocabulary import Vocabulary, read_vocabulary
from tests.gguf_tools.conftest import Opener
from tests.gguf_tools.folder import CONFIG, byte_level, write_folder

Fields = list[tuple[int, int | float | bytes | str]]
TRAINER: Fields = [(3, 2), (35, 1)]
NORMALIZER: Fields = [(4, 0)]
TEXTS = [("▁", -3.0), ("h", -4.0), ("e", -5.0), ("l", -6.0), ("o", -7.0), ("he", -1.0), ("el", -3.5), ("ll", 0.0), ("▁he", -2.0)]


def message(fields: Fields) -> bytes:
    """A protobuf message."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value % (1 << 64))
        else:
            raw = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(raw)) + raw
    return out


def piece(text: str | bytes, score: float = 0.0, kind: int = 1) -> bytes:
    return message([(1, text), (2, score), (3, kind)])


PIECES = [piece("<unk>", kind=2), piece("<s>", kind=3), piece("</s>", kind=3),
          *(piece(f"<0x{b:02X}>", kind=6) for b in range(256)), *(piece(*each) for each in TEXTS)]  # fmt: skip


def model(pieces: list[bytes] = PIECES, trainer: Fields = TRAINER, normalizer: Fields = NORMALIZER) -> bytes:
    return message([*((1, one) for one in pieces), (2, message(trainer)), (3, message(normalizer)), (7, 5)])


def test_sentencepiece_by_hand_is_tokenised_by_hand(tmp_path: Path, open_llama: Opener) -> None:
    folder = write_folder(tmp_path / "hf", CONFIG | {"eos_token_id": None}, tokenizer={})
    (folder / "tokenizer.model").write_bytes(model())
    info = convert_model(folder, tmp_path / "m.gguf").model
    assert (info.bos_token, info.eos_token, info.add_bos) == (1, 2, True)
    # ▁ h e l o: he (-1.0) before el (-3.5), then ▁he (-2.0). ▁ h e l l o: first ll (0.0). é falls back to its two bytes.
    llama = open_llama(tmp_path / "m.gguf")
    assert llama.tokenise("helo") == [267, 262, 263]
    assert llama.tokenise("helloé") == [267, 266, 263, 3 + 0xC3, 3 + 0xA9]


def test_added_tokens_fill_the_vocabulary_and_the_rest_is_unused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<user>": 268, "<pad>": 269, "<beyond>": 271}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}, "269": {"content": "<pad>", "special": True}},
        "pad_token": "<pad>", "add_eos_token": True,
    }))  # fmt: skip
    found = read_vocabulary(tmp_path, 271, {})
    assert found.tokens[267:] == ("▁he", "<user>", "<pad>", "[PAD270]")
    assert found.types[267:] == (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNUSED)
    assert (found.types[0], found.types[1]) == (TokenType.UNKNOWN, TokenType.CONTROL)
    assert found.warnings == ("the added token '<beyond>' was left out: the model has no embedding for it.",)
    assert found.token_ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 269}
    assert (found.model, found.add_bos, found.add_eos, found.add_space_prefix) == ("llama", True, True, True)


@pytest.mark.parametrize(("data", "sentence"), [
    (b"", r"is no sentencepiece model: it has no pieces"),
    (b"\x0a\xff\xff\xff\xff\x0f", r"is no sentencepiece model, or truncated \(at byte 6 of a message of 6\)"),
    (b"\xff" * 20, r"is no sentencepiece model, or truncated"),
    (b"\x0b\x00", r"is no sentencepiece model \(wire type 3 at byte 1"),
    (model()[:-40], r"is no sentencepiece model, or truncated|needs byte_fallback|type unigram"),
    (model(trainer=[(3, 1), (35, 1)]), r"is a sentencepiece model of type unigram, but LLaMA's type, bpe, is converted"),
    (model(trainer=[(3, 2)]), r"has 256 byte pieces, but llama.cpp needs byte_fallback with all 256"),
    (model(PIECES[:200]), r"has 197 byte pieces, but"),
    (model(trainer=[*TRAINER, (24, 1)]), r"puts spaces at the end of words, which llama.cpp does not do"),
    (model(normalizer=[]), r"removes extra spaces, which llama.cpp does not do"),
    (model(normalizer=[(4, 0), (2, b"abc")]), r"normalises texts by a character map, which llama.cpp does not do"),
    (model(normalizer=[(4, 0), (5, 0)]), r"does not escape spaces, which llama.cpp always does"),
    (model([*PIECES, piece(b"\xff")]), r"piece 268 is not UTF-8"),
    (model([*PIECES, piece("x", kind=9)]), r"piece 268 is of type 9, which is unknown"),
    (model([*PIECES, piece("x", float("nan"))]), r"piece 268 is 'x' with score nan, but must have a text and a finite score"),
    (model([*PIECES, piece("he")]), r"the token 'he' occurs twice"),
])  # fmt: skip
def test_sentencepiece_models_that_llama_cpp_would_read_otherwise_are_refused(
    data: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(FileError, match=sentence):
        read_vocabulary(tmp_path, 300, {})


@settings(max_examples=50)
@given(data=st.data())
def test_a_damaged_sentencepiece_model_is_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = bytearray(model())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    path.write_bytes(whole)
    with suppress(FileError):
        assert len(read_sentencepiece(path).pieces) > 0


def fallback(**change: Any) -> dict[str, Any]:
    """The same vocabulary as `model()` as a tokenizer.json."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *(text for text, _ in TEXTS)]
    return {
        "model": {"type": "BPE", "byte_fallback": True, "vocab": {text: i for i, text in enumerate(texts)},
                  "merges": [["l", "l"], ["h", "e"], ["▁", "he"], ["e", "l"]]},
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "added_tokens": [{"id": 2, "content": "</s>", "special": True}],
    } | change  # fmt: skip


def vocabulary(tmp_path: Path, content: dict[str, Any], **config_ids: int) -> Vocabulary:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return read_vocabulary(tmp_path, 300, config_ids or {"eos": 2})


def test_byte_fallback_is_read_as_sentencepiece(tmp_path: Path, open_llama: Opener) -> None:
    folder = write_folder(tmp_path / "hf", CONFIG | {"eos_token_id": 2}, tokenizer=fallback())
    convert_model(folder, tmp_path / "m.gguf")
    llama = open_llama(tmp_path / "m.gguf")
    assert llama.tokenise("helo") == [267, 262, 263]
    assert llama.tokenise("helloé") == [267, 266, 263, 3 + 0xC3, 3 + 0xA9]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    exact = vocabulary(tmp_path, fallback())
    assert (exact.add_space_prefix, exact.warnings) == (True, ())
    never = vocabulary(tmp_path, fallback(normalizer=None, pre_tokenizer=metaspace))
    assert (never.add_space_prefix, never.warnings) == (False, ())
    first = vocabulary(tmp_path, fallback(normalizer=None, pre_tokenizer=metaspace | {"prepend_scheme": "first"}))
    assert first.add_space_prefix is True
    assert first.warnings[0].startswith("a text that begins with a space gets one more before it")


def changed(path: str, value: Any, make: Callable[[], dict[str, Any]] = byte_level) -> dict[str, Any]:
    content = make()
    *stages, last = path.split(".")
    place = content
    for stage in stages:
        place = place[stage]
    place[last] = value
    return content


@pytest.mark.parametrize(("content", "sentence"), [
    (changed("model.type", "Unigram"), r"the tokenizer's model is 'Unigram', but only BPE is converted"),
    (changed("model", None), r"the tokenizer's model is None"),
    (changed("model.dropout", 0.1), r"the tokenizer's dropout is 0.1, which llama.cpp does not have"),
    (changed("model.vocab", {"a": -1}), r"vocab must map tokens to their ids"),
    (changed("model.vocab.he", 3), r"the tokens '.' and 'he' both have id 3"),
    (changed("model.merges", None), r"the tokenizer's merges must be a list"),
    (changed("model.merges", ["h e", "x"]), r"merge 1 is 'x', but must be two parts of a token of the vocabulary"),
    (changed("model.merges", [["q", "q"]]), r"merge 0 is \['q', 'q'\], but must be two parts"),
    (changed("model.ignore_merges", True), r"the pre-tokenizer 'gpt2' \(ignore_merges True\) is not one that llama.cpp is"),
    (changed("normalizer", {"type": "NFC"}), r"normalises texts, which llama.cpp does not do for byte-level BPE"),
    (changed("pre_tokenizer", {"type": "Whitespace"}), r"the pre-tokenizer \{'type': 'Whitespace'\} is not one that llama"),
    (changed("pre_tokenizer", None), r"the pre-tokenizer '' \(ignore_merges False\) is not one .* are those of gpt-2, smollm"),
    (changed("pre_tokenizer.add_prefix_space", True), r"the pre-tokenizer \{'type': 'ByteLevel', 'add_prefix_space': True"),
    (changed("pre_tokenizer", 3), r"a stage of the tokenizer is 3, but must be an object"),
    (changed("pre_tokenizer", {"type": "Sequence"}), r"a Sequence of the tokenizer must have a list of pretokenizers"),
    (changed("added_tokens", [{"id": 5}]), r"the added token \{'id': 5\} must have an id and a content"),
    (changed("model.merges", [["l", "l"], ["▁", "he"], ["e", "l"]], fallback), r"the merges that make 'he' are not those of a sentencep"),
    (changed("model.merges", [["h", "e"], ["l", "l"], ["h", "e"]], fallback), r"the merges that make 'he' are not"),
    (changed("model.vocab.<0x41>", 500, fallback), r"has the token '<0x41>' beyond the 300 that the model has embeddings for"),
    (changed("normalizer", {"type": "NFKC"}, fallback), r"the normalizer \{'type': 'NFKC'\} is not one that llama.cpp has"),
    (changed("normalizer", None, fallback), r"does not write spaces as ▁, which llama.cpp does"),
    (changed("pre_tokenizer", {"type": "Metaspace", "replacement": "▁"}, fallback), r"the pre-tokenizer .* is not one that"),
])  # fmt: skip
def test_tokenizers_that_llama_cpp_lacks_are_refused(content: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=sentence):
        vocabulary(tmp_path, content)


def test_byte_fallback_without_all_bytes_is_refused(tmp_path: Path) -> None:
    content = fallback()
    del content["model"]["vocab"]["<0x41>"]
    with pytest.raises(FileError, match=r"lacks the byte token <0x41>, which llama.cpp needs for unknown characters"):
        vocabulary(tmp_path, content)


def test_files_beside_the_tokenizer_are_checked_too(tmp_path: Path) -> None:
    for name, text, sentence in (
        ("tokenizer_config.json", "{", r"tokenizer_config.json: is not JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', r"tokenizer_config.json: the added token \{\} must"),
        ("tokenizer_config.json", '{"chat_template": 5}', r"chat_template must be a text, not int"),
        ("added_tokens.json", '{"a": "b"}', r"the id of 'a' is 'b', but must be a number"),
        ("chat_template.jinja", "\udcff", r"chat_template.jinja: is not UTF-8 text \(byte 0\)"),
    ):
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(FileError, match=sentence):
            vocabulary(tmp_path, byte_level())
        (tmp_path / name).unlink()
    assert vocabulary(tmp_path, byte_level()).pre == "gpt-2"
