"""The tokenizer of a model file, as far as llama.cpp trusts it.

Two tokens of the same text, no token where one is to be prepended, or bytes that no token stands for end the process: on loading, or
later on the first text that needs them.
"""

from __future__ import annotations

from gguf.constants import GGUFValueType, TokenType

from gguf_tools.errors import FileError
from gguf_tools.header import Array, Header

TOKENS = "tokenizer.ggml.tokens"
_FLAGS = ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces", "normalizer.lowercase",
          "normalizer.strip_accents")  # fmt: skip
_IDS = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep",
        "fim_sep", "prefix", "suffix", "middle")  # fmt: skip
_DEFAULT_IDS = {"gpt2": (11, 11), "llama": (1, 2)}  # bos, eos of tokenizers that are checked
_MAX_TOKENS = 1 << 22
_MAX_TOKEN_BYTES = 1 << 16


def check_tokenizer(header: Header, *, add_bos: bool) -> list[str]:
    """Check a tokenizer; returns what was not checked. `add_bos`: whether texts begin with the BOS token.

    Raises:
        FileError: the first thing wrong, naming the key and the token.
    """
    label, model = header.label, header.text("tokenizer.ggml.model")
    n_tokens = _check_array(header, TOKENS, (GGUFValueType.STRING,), 0)
    if not 1 <= n_tokens <= _MAX_TOKENS:
        raise FileError(f"{label}: {TOKENS} has {n_tokens} tokens, but must have 1 to {_MAX_TOKENS}.")
    for name in _FLAGS:
        _check_scalar(header, f"tokenizer.ggml.{name}", GGUFValueType.BOOL)
    for name in _IDS:
        _check_scalar(header, f"tokenizer.ggml.{name}_token_id", GGUFValueType.UINT32)
    _check_scalar(header, "tokenizer.ggml.token_type_count", GGUFValueType.UINT32)
    _check_scalar(header, "tokenizer.ggml.pre", GGUFValueType.STRING)
    for key, kinds in (
        ("tokenizer.ggml.scores", (GGUFValueType.FLOAT32, GGUFValueType.INT32)),
        ("tokenizer.ggml.token_type", (GGUFValueType.INT32,)),
    ):
        if key in header.values:
            _check_array(header, key, kinds, n_tokens)
    if "tokenizer.ggml.suppress_tokens" in header.values:
        _check_array(header, "tokenizer.ggml.suppress_tokens", (GGUFValueType.INT32,), 0)
    positions = _token_positions(header)
    if model not in _DEFAULT_IDS:
        return [f"the tokenizer {model!r:.40}"]
    if model == "gpt2":
        _check_array(header, "tokenizer.ggml.merges", (GGUFValueType.STRING,), 0)
    else:
        _check_byte_tokens(header, positions)
    for kind, wanted, default in zip(
        ("bos", "eos"), (add_bos, _flag(header, "add_eos_token")), _DEFAULT_IDS[model], strict=True
    ):
        token = header.number(f"tokenizer.ggml.{kind}_token_id")
        if wanted and (default if token is None or token >= n_tokens else token) >= n_tokens:
            raise FileError(f"{label}: texts get a {kind.upper()} token, but tokenizer.ggml.{kind}_token_id names none of {n_tokens}.")
    return []


def _check_scalar(header: Header, key: str, kind: GGUFValueType) -> None:
    found = header.values.get(key, (kind, None))[0]
    if found != kind:
        raise FileError(f"{header.label}: {key} is of type {found.name}, but must be {kind.name}.")


def _check_array(header: Header, key: str, kinds: tuple[GGUFValueType, ...], least: int) -> int:
    """The length of an array that must be there."""
    kind, value = header.values.get(key, (None, None))
    if not isinstance(value, Array) or value.type not in kinds:
        found = "missing" if kind is None else f"of {value.type.name}" if isinstance(value, Array) else f"of type {kind.name}"
        raise FileError(f"{header.label}: {key} is {found}, but must be an array of {' or '.join(kind.name for kind in kinds)}.")
    if value.count < least:
        raise FileError(f"{header.label}: {key} has {value.count} elements at byte {value.offset}, but there are {least} tokens.")
    return value.count


def _flag(header: Header, name: str) -> bool:
    return header.values.get(f"tokenizer.ggml.{name}", (None, False))[1] is True


def _token_positions(header: Header) -> dict[bytes, int]:
    """Token texts as llama.cpp sees them, which ends them at a zero byte and names empty ones; they must differ."""
    positions: dict[bytes, int] = {}
    for i, raw in enumerate(header.strings(TOKENS)):
        text = raw.split(b"\0", 1)[0] or b"[EMPTY_%d]" % i
        if len(text) > _MAX_TOKEN_BYTES:
            raise FileError(f"{header.label}: {TOKENS} has a token {i} of {len(text)} bytes, but at most {_MAX_TOKEN_BYTES} are accepted.")
        first = positions.setdefault(text, i)
        if first != i:
            raise FileError(f"{header.label}: {TOKENS} has the text {text[:40]!r} twice, as tokens {first} and {i}; llama.cpp aborts on it.")
    return positions


def _check_byte_tokens(header: Header, positions: dict[bytes, int]) -> None:
    """In a sentencepiece vocabulary every byte must be a token, or the first text that has it ends the process."""
    for byte in range(256):
        if b"<0x%02X>" % byte not in positions and bytes([byte]) not in positions:
            raise FileError(f"{header.label}: {TOKENS} has no token <0x{byte:02X}>; llama.cpp aborts on the first text with that byte.")
    kinds = header.numbers("tokenizer.ggml.token_type") or []
    for text, i in positions.items():
        if i < len(kinds) and kinds[i] == TokenType.BYTE and not (len(text) == 6 and text.startswith(b"<0x")):
            raise FileError(f"{header.label}: token {i} ({text[:40]!r}) is of type byte, but such are written <0x00> to <0xFF>.")
