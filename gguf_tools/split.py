"""A model cut in parts, each a model of some of its layers that llama.cpp loads: trunk and top, and slices between them.

The trunk, which computes what enters layer k, keeps layer k as its last one, although only its input is wanted: llama.cpp computes the
last layer of a model only where logits are asked for, all others for every token.

Tensors are read and written a few megabytes at a time, so cutting takes no more memory for a larger model: a phone that cuts one has
room for a part of it only, and pages of a mapped file would count as memory of the program.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType

from gguf_tools.errors import FileError
from gguf_tools.header import MODEL_LIMITS, Array, Header, TensorEntry, parse_header
from gguf_tools.mapping import mapped
from gguf_tools.model import NO_VOCABULARY, ModelInfo, model_info, read_model_info
from gguf_tools.output import Progress, new_file
from gguf_tools.pieces import Source, unreadable, zeros
from gguf_tools.stream import OutTensor, check_room, elements, metadata_of, write_tensors

Path_ = str | os.PathLike[str]
Vocabulary = Literal["kept", "none"]

_EMBEDDINGS, _OUTPUT, _BIAS = "token_embd.weight", "output.weight", "output.bias"
N_UNNAMED = 32  # of a part that is fed no tokens and gives no logits; llama.cpp wants embeddings
# After how many layers an architecture repeats itself (sliding windows, layers without rotation): only a multiple of
# that can be cut off the front without changing what the remaining layers compute. Architectures not listed are not
# known.
_PERIODS = {"llama": 1, "qwen2": 1, "qwen3": 1, "gemma": 1, "gemma2": 2, "gemma3": 6, "smollm3": 4}
# llama.cpp scales whatever enters the first layer of these, as if it were always embeddings of tokens.
_SCALED = ("gemma", "gemma2")
# llama.cpp scales attention differently for the model of this many layers, and would not for a part of it.
_SPECIAL_DEPTHS = {"gemma2": 46, "gemma3": 62}
# What may be given for each layer, and then can be for some. Not which layers have a sliding window: llama.cpp ends the process for a
# model of these architectures where none has.
_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length", "expert_used_count")


def split_model(
    source: Path_, at: int, trunk: Path_, top: Path_, *, progress: Progress | None = None, force: bool = False
) -> tuple[ModelInfo, ModelInfo]:
    """Write layers 0 to `at` to `trunk` and layers `at` to the last, numbered from 0, to `top`, each complete or not at all.

    Fed the values that enter the trunk's last layer, the top gives the logits of the whole model.

    Raises:
        FileError: there is no such layer, the layers would not compute the same elsewhere, or a path cannot be written.
    """
    info = read_model_info(source)
    if not 1 <= at < info.n_layers:
        raise FileError(f"{source}: has layers 0 to {info.n_layers - 1}, so it can be cut at 1 to {info.n_layers - 1}, not at {at}.")
    if len({os.path.realpath(path) for path in (source, trunk, top)}) < 3:
        raise FileError(f"{trunk} and {top}: model, trunk and top need three different paths.")
    lower, upper = _part(source, 0, at + 1, "kept"), _part(source, at, info.n_layers, "kept")
    with new_file(trunk, force=force) as lower_path, new_file(top, force=force) as upper_path:
        for path in (lower_path, upper_path):
            path.touch()  # so that a folder that cannot be written is told before any work
        _write(lower, lower_path, trunk, progress)
        _write(upper, upper_path, top, progress)
    return read_model_info(trunk), read_model_info(top)


def extract_layers(
    source: Path_,
    target: Path_,
    first: int,
    last: int,
    *,
    vocabulary: Vocabulary = "kept",
    shortlist: Sequence[int] | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> ModelInfo:
    """Write a model of layers `first` to `last` - 1 alone, numbered from 0, unchanged, with embeddings and output.

    Fed the values that enter layer `first`, the layers up to the end give the logits of the whole model. With `vocabulary` "none" the part
    has no tokenizer and is fed values, also at layer 0, so of the two matrices as large as the vocabulary it has the output only, and that
    only where it ends at the last layer. Any other gives the values that leave its last layer; its logits, of 32 tokens, mean nothing. Such
    parts are read with `read_model_info(..., needs_vocabulary=False)`. The upper one of them can have the output of a `shortlist` of tokens
    alone: its logits are theirs, in that order.

    Raises:
        FileError: there are no such layers or tokens, they would not compute the same in another place, or `target` cannot be written.
    """
    part = _part(source, first, last, vocabulary, shortlist)
    if os.path.realpath(source) == os.path.realpath(target):
        raise FileError(f"{target}: is the source as well; the result needs another path.")
    with new_file(target, force=force) as temporary:
        _write(part, temporary, target, progress)
    return read_model_info(target, needs_vocabulary=vocabulary == "kept")


@dataclass(frozen=True)
class _Part:
    """What is to be written: metadata, and tensors by their new names; those without a place in the source are zeros."""

    source: Path_
    writer: GGUFWriter
    tensors: Mapping[str, TensorEntry | None]
    n_embd: int
    shortlist: Sequence[int] | None = None  # rows of the output, None: all

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as it is written."""
        entry = self.tensors[name]
        if entry is None:
            return N_UNNAMED, self.n_embd
        rows = self._rows(name)
        return entry.shape if rows is None else (len(rows), *entry.shape[1:])

    def written(self, name: str, source: Source) -> OutTensor:
        """A tensor as it is written."""
        entry, shape, rows = self.tensors[name], self.shape(name), self._rows(name)
        if entry is None:
            return OutTensor(name, shape, GGMLQuantizationType.F32, partial(zeros, shape))
        return OutTensor(name, shape, entry.type, partial(source.whole, entry) if rows is None else partial(source.rows, entry, rows))

    def _rows(self, name: str) -> Sequence[int] | None:
        """Which rows of a tensor are kept, None: all."""
        return self.shortlist if name in (_EMBEDDINGS, _BIAS) else None


def _part(source: Path_, first: int, last: int, vocabulary: Vocabulary, shortlist: Sequence[int] | None = None) -> _Part:
    with mapped(source) as data:
        header = parse_header(data, str(source), MODEL_LIMITS)
        info = model_info(header)
        if not 0 <= first < last <= info.n_layers:
            raise FileError(f"{source}: has layers 0 to {info.n_layers - 1}, but {first} to {last - 1} were asked for.")
        _check_movable(header, info, first, last)
        if shortlist is not None:
            _check_shortlist(info, last, vocabulary, shortlist)
        instead: dict[str, Any] = {f"{info.architecture}.block_count": last - first}
        for key in _per_layer_keys(header, info) if last - first < info.n_layers else ():
            value = header.values[key][1]
            assert isinstance(value, Array)
            instead[key] = elements(header, key, value)[first:last]
        tensors: dict[str, TensorEntry | None] = {
            moved: entry for name, entry in header.tensors.items() if (moved := _moved(name, first, last)) is not None
        }
        if vocabulary == "kept":
            return _Part(source, metadata_of(header, instead=instead), tensors, info.n_embd)
        _reduce(tensors, concludes=last == info.n_layers)
        size_key = f"{info.architecture}.vocab_size"
        own = {size_key, *(key for key in header.values if key.startswith("tokenizer."))}
        writer = metadata_of(header, own, instead)
        writer.add_tokenizer_model(NO_VOCABULARY)
        part = _Part(source, writer, tensors, info.n_embd, shortlist)
        writer.add_uint32(size_key, part.shape(_EMBEDDINGS)[0])
        return part


def _check_shortlist(info: ModelInfo, last: int, vocabulary: Vocabulary, shortlist: Sequence[int]) -> None:
    """Refuse what is no shortlist of this part's tokens."""
    if vocabulary != "none" or last < info.n_layers:
        raise FileError(f"{info.path}: a shortlist of tokens is for a part without vocabulary that ends at the last layer.")
    if not shortlist or len(set(shortlist)) < len(shortlist) or not 0 <= min(shortlist) <= max(shortlist) < info.n_vocab:
        raise FileError(f"{info.path}: a shortlist of tokens must have some of 0 to {info.n_vocab - 1}, each once.")


def _moved(name: str, first: int, last: int) -> str | None:
    """The name of a tensor in the part, None where it is of another one's layers."""
    kind, _, rest = name.partition(".")
    number, _, module = rest.partition(".")
    if kind != "blk" or not (number.isascii() and number.isdecimal()):
        return name
    return f"blk.{int(number) - first}.{module}" if first <= int(number) < last else None


def _reduce(tensors: dict[str, TensorEntry | None], *, concludes: bool) -> None:
    """Leave what a part without vocabulary computes with. Where there is no output, llama.cpp takes the embeddings for it."""
    output = tensors.pop(_OUTPUT, None)
    if concludes:
        tensors[_EMBEDDINGS] = output or tensors[_EMBEDDINGS]
        return
    tensors.pop(_BIAS, None)  # a value for each token
    tensors[_EMBEDDINGS] = None


def _write(part: _Part, temporary: Path, target: Path_, progress: Progress | None) -> None:
    """Copy a part to `temporary`, which is to become `target`."""
    with closing(Source(part.source)) as source:
        tensors = [part.written(name, source) for name in part.tensors]
        check_room(Path(target), temporary, tensors)
        try:
            write_tensors(temporary, part.writer, tensors, progress)
        except OSError as error:
            raise FileError(f"{target}: cannot be written: {error.strerror or error}.") from error


def can_be_cut(info: ModelInfo, first: int) -> bool:
    """Whether `extract_layers` can make a part of this model that begins at layer `first`."""
    try:
        stamp = os.stat(info.path)
    except OSError as error:
        raise unreadable(info.path, error) from None
    period = _period_or_none(info.path, (stamp.st_size, stamp.st_mtime_ns))
    return first == 0 or (period is not None and first % period == 0 and info.architecture not in _SCALED)


@lru_cache(maxsize=4)  # searching for a setting that fits asks hundreds of times
def _period_or_none(path: Path, stamp: tuple[int, int]) -> int | None:
    """`_period`, None where there is none; `stamp` tells another file of the same name apart."""
    try:
        with mapped(path) as data:
            header = parse_header(data, str(path), MODEL_LIMITS)
            return _period(header, model_info(header))
    except FileError:
        return None


def _check_movable(header: Header, info: ModelInfo, first: int, last: int) -> None:
    """Refuse a part whose layers depend on their number; llama.cpp would silently compute something else."""
    if last - first == info.n_layers:
        return
    period = _period(header, info)
    if first % period:
        raise FileError(f"{header.label}: layers of {info.architecture} repeat every {period}, so a part cannot begin at {first}.")
    if first and info.architecture in _SCALED:
        raise FileError(
            f"{header.label}: llama.cpp scales all that a {info.architecture} model is fed as if it were embeddings, "
            f"so a part cannot begin at {first}."
        )


def _period(header: Header, info: ModelInfo) -> int:
    """After how many layers the model repeats itself.

    Raises:
        FileError: it does not, or not in a way that is known.
    """
    architecture = info.architecture
    period = _PERIODS.get(architecture)
    if period is None:
        raise FileError(
            f"{header.label}: layers of the architecture {architecture!r} may depend on their position; "
            f"they can be extracted from {', '.join(_PERIODS)}."
        )
    if info.n_layers == _SPECIAL_DEPTHS.get(architecture):
        raise FileError(f"{header.label}: a {architecture} model of {info.n_layers} layers computes differently in part.")
    _per_layer_keys(header, info)
    pattern = f"{architecture}.attention.sliding_window_pattern"
    if period > 1 and pattern in header.values:
        period = header.number(pattern) or 1
    return period


def _per_layer_keys(header: Header, info: ModelInfo) -> list[str]:
    """Metadata with a value for each layer.

    Raises:
        FileError: there is another array as long, of the layers or not.
    """
    prefix = f"{info.architecture}."
    found = [
        key for key, (_, value) in header.values.items()
        if key.startswith(prefix) and isinstance(value, Array) and value.count == info.n_layers
    ]  # fmt: skip
    for key in found:
        if key.removeprefix(prefix) not in _PER_LAYER:
            raise FileError(f"{header.label}: {key} has a value for each layer, or merely as many, and cannot be cut to a part.")
    return found


def slices(info: ModelInfo, first: int, n_layers: int) -> tuple[int, ...]:
    """Where the layers below `first` are cut into slices of at most `n_layers`, or of as few as the architecture allows: 0, ..., `first`.

    Raises:
        FileError: no part of this model can begin at `first`.
    """
    places = [layer for layer in range(1, first + 1) if can_be_cut(info, layer)]
    if not places or places[-1] != first:
        raise FileError(f"{info.path}: no part of this {info.architecture} model can begin at layer {first}, so what is below cannot be staged.")
    found = [0]
    while found[-1] < first:
        reach = [place for place in places if found[-1] < place <= found[-1] + n_layers]
        found.append(reach[-1] if reach else next(place for place in places if place > found[-1]))
    return tuple(found)
