"""What a base model is, read from its GGUF header without loading it: shapes, vocabulary, memory of its KV cache.

The defaults that llama.cpp applies where a key is absent (head sizes, special tokens, whether a text gets one) are
applied here too, so that a plan made from this record agrees with the engine that later loads the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from gguf_tools.errors import FileError
from gguf_tools.header import MODEL_LIMITS, Array, Header, parse_header
from gguf_tools.mapping import mapped

# Most specific first: a chat model has several of these, and its turns end with the earlier one.
_END_OF_TURN = (b"<|eot_id|>", b"<|im_end|>", b"<|end|>", b"<end_of_turn>", b"<EOT>", b"_<EOT>", b"[EOT]",
                b"<end_of_utterance>", b"<|end_of_text|>", b"<|endoftext|>")  # fmt: skip
_ADDS_BOS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                       "jina-v5-nano", "tekken", "chameleon"})  # fmt: skip
NO_VOCABULARY = "no_vocab"  # as tokenizer.ggml.model: llama.cpp then has numbers for tokens, and no texts
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class ModelInfo:
    """A base model as its header describes it.

    `tensors` maps a name to its shape in numpy order, (n_out, n_in) for a matrix, and the name of its type. `kv_heads`
    has one count a layer, 0 for a layer without attention. `quantisation` is the tensor type that most bytes are in.
    `n_merges` counts the merges of a byte-pair vocabulary, 0 for others.
    """

    path: Path
    architecture: str
    name: str
    n_layers: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_merges: int
    context_length: int
    quantisation: str
    file_type: int | None
    size_bytes: int
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    tied_embeddings: bool
    chat_template: str | None
    bos_token: int | None
    eos_token: int | None
    eot_token: int | None
    add_bos: bool
    kv_heads: tuple[int, ...]
    key_length: int
    value_length: int

    def kv_bytes_per_token(self, type_k: str = "F16", type_v: str = "F16") -> int:
        """Bytes of KV cache that one token takes over all layers, its types given by name (`F16`, `Q8_0`).

        Sliding windows are not deducted, so this is what a context as long as the window needs.

        Raises:
            FileError: llama.cpp has no such type.
        """
        total = 0.0
        for type_name, length in ((type_k, self.key_length), (type_v, self.value_length)):
            try:
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]]
            except KeyError:
                raise FileError(f"KV cache type {type_name!r} is unknown; F16 and Q8_0 are usual.") from None
            total += sum(self.kv_heads) * length * block_bytes / block
        return math.ceil(total)


def read_model_info(path: str | os.PathLike[str], *, needs_vocabulary: bool = True) -> ModelInfo:
    """Read what a base model is; its weights are not touched. Without `needs_vocabulary` it may be a part that has none.

    Raises:
        FileError: it is missing, damaged, no GGUF file, an adapter, one part of several, or has no tokenizer.
    """
    with mapped(path) as data:
        return model_info(parse_header(data, str(path), MODEL_LIMITS), needs_vocabulary=needs_vocabulary)


def model_info(header: Header, *, needs_vocabulary: bool = True) -> ModelInfo:
    """`read_model_info` of a header that is already at hand, whose label is the path."""
    label, path = header.label, Path(header.label)
    architecture = _kind_of_model(header)
    n_layers = _required(header, f"{architecture}.block_count", 10_000)
    n_embd = _required(header, f"{architecture}.embedding_length", 1 << 24)
    heads = _per_layer(header, f"{architecture}.attention.head_count", n_layers)
    kv_heads = _per_layer(header, f"{architecture}.attention.head_count_kv", n_layers, default=heads)
    n_head = max(heads)
    if n_head == 0:
        raise FileError(
            f"{label}: {architecture}.attention.head_count is 0; models without attention are not supported."
        )
    bare = not needs_vocabulary and header.text("tokenizer.ggml.model") == NO_VOCABULARY
    n_vocab = _required(header, f"{architecture}.vocab_size", 1 << 31) if bare else _n_vocab(header)
    embeddings = header.tensors.get("token_embd.weight")
    if embeddings is None:
        raise FileError(f"{label}: holds no tensor token_embd.weight, so it is no text model (or a part of one).")
    sizes: Counter[str] = Counter()
    for entry in header.tensors.values():
        sizes[entry.type.name] += entry.size_bytes
    bos, eos, eot = _special_tokens(header, n_vocab)
    return ModelInfo(
        path=path,
        architecture=architecture,
        name=header.text("general.name") or path.stem,
        n_layers=n_layers,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=max(kv_heads),
        n_vocab=n_vocab,
        n_merges=_count(header, "tokenizer.ggml.merges"),
        context_length=_required(header, f"{architecture}.context_length", 1 << 31),
        quantisation=sizes.most_common(1)[0][0],
        file_type=header.number("general.file_type"),
        size_bytes=len(header.data),
        tensors={name: (entry.shape, entry.type.name) for name, entry in header.tensors.items()},
        tied_embeddings="output.weight" not in header.tensors,
        chat_template=header.text("tokenizer.chat_template"),
        bos_token=bos,
        eos_token=eos,
        eot_token=eot,
        add_bos=_adds_bos(header),
        kv_heads=kv_heads,
        key_length=_required(header, f"{architecture}.attention.key_length", 1 << 16, default=n_embd // n_head),
        value_length=_required(header, f"{architecture}.attention.value_length", 1 << 16, default=n_embd // n_head),
    )


def is_adapter(header: Header) -> bool:
    """Whether the file says that it is an adapter, which need not be a sound one."""
    return header.text("general.type") == "adapter" or "adapter.type" in header.values


def _kind_of_model(header: Header) -> str:
    """The architecture of a file that is a whole text model."""
    kind = header.text("general.type")
    if is_adapter(header):
        raise FileError(f"{header.label}: is an adapter, but a base model was expected.")
    if kind not in (None, "model"):
        raise FileError(f"{header.label}: general.type is {kind!r:.80}, but a base model was expected.")
    n_parts = header.number("split.count") or 1
    if n_parts > 1:
        raise FileError(
            f"{header.label}: is one of {n_parts} parts of a split model, which is not supported; "
            "join them with `llama-gguf-split --merge` first."
        )
    architecture = header.text("general.architecture")
    if architecture is None or not _ARCHITECTURE.fullmatch(architecture):
        raise FileError(f"{header.label}: general.architecture is {architecture!r:.80}, but must name an architecture.")
    return architecture


def _required(header: Header, key: str, most: int, default: int | None = None) -> int:
    value = header.number(key) if key in header.values else default
    if value is None or not 1 <= value <= most:
        raise FileError(f"{header.label}: {key} is {'missing' if value is None else value}, but must be 1 to {most}.")
    return value


def _per_layer(header: Header, key: str, n_layers: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """A count for each layer, from a single value or an array."""
    counts = header.numbers(key)
    if counts is None:
        value = header.number(key)
        if value is None and default is not None:
            return default
        counts = [_required(header, key, 1 << 16)] * n_layers
    if len(counts) < n_layers or not all(0 <= count <= 1 << 16 for count in counts):
        raise FileError(f"{header.label}: {key} has {len(counts)} values, but must have {n_layers}, each 0 to 65536.")
    return tuple(counts[:n_layers])


def _n_vocab(header: Header) -> int:
    tokens = header.values.get("tokenizer.ggml.tokens", (None, None))[1]
    named = header.text("tokenizer.ggml.model") not in (None, "none", NO_VOCABULARY)
    if not named or not isinstance(tokens, Array) or tokens.type != GGUFValueType.STRING or not tokens.count:
        raise FileError(
            f"{header.label}: has no tokenizer (tokenizer.ggml.model and .tokens); convert it with its vocabulary."
        )
    return tokens.count


def _count(header: Header, key: str) -> int:
    """Elements of the array at `key`, 0 where there is none."""
    value = header.values.get(key, (None, None))[1]
    return value.count if isinstance(value, Array) else 0


def _special_tokens(header: Header, n_vocab: int) -> tuple[int | None, int | None, int | None]:
    """Ids of the tokens that begin a text, end it, and end a turn; None where the model has no such token."""
    defaults = {"llama": (1, 2), "gpt2": (11, 11)}.get(header.text("tokenizer.ggml.model") or "", (None, None))
    found: list[int | None] = []
    for kind, default in (("bos", defaults[0]), ("eos", defaults[1]), ("eot", None)):
        token = header.number(f"tokenizer.ggml.{kind}_token_id")
        usable = token if token is not None and 0 <= token < n_vocab else default
        found.append(usable if usable is not None and usable < n_vocab else None)
    bos, eos, eot = found
    if eot is None:
        wanted = set(_END_OF_TURN)
        ids = {text: i for i, text in enumerate(header.strings("tokenizer.ggml.tokens")) if text in wanted}
        eot = next((ids[text] for text in _END_OF_TURN if text in ids), None)
    return bos, eos, eot


def _adds_bos(header: Header) -> bool:
    value = header.values.get("tokenizer.ggml.add_bos_token", (None, None))[1]
    if isinstance(value, bool):
        return value
    model = header.text("tokenizer.ggml.model")
    return model in ("llama", "bert") or (model == "gpt2" and header.text("tokenizer.ggml.pre") in _ADDS_BOS)


def file_sha256(path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> str:
    """The SHA-256 of a file in hexadecimal, read in a stream.

    With `cache_dir` the digest is kept in `sha256.json` there and used again while the file's size and modification
    time stay the same: hashing 4 GB takes seconds, and every command needs the digest. A cache that is damaged or
    cannot be written only costs that time.

    Raises:
        FileError: the file cannot be read.
    """
    key = os.path.realpath(path)
    cache = Path(cache_dir) / "sha256.json" if cache_dir is not None else None
    known = _cached(cache)
    try:
        with open(path, "rb") as file:
            info = os.fstat(file.fileno())
            stamp = [info.st_size, info.st_mtime_ns]
            entry = known.get(key)
            if isinstance(entry, list) and entry[:2] == stamp and len(entry) == 3:
                return str(entry[2])
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}.") from None
    if cache is not None and stamp == [after.st_size, after.st_mtime_ns]:
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # the digest is right whether or not it can be remembered
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({**_cached(cache), key: [*stamp, digest]}, indent=1))
            os.replace(temporary, cache)
    return digest


def _cached(cache: Path | None) -> dict[str, object]:
    """What the cache file holds, nothing where it is absent or damaged."""
    if cache is None:
        return {}
    try:
        content = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
