"""How two adapters, or two models, differ, tensor by tensor: norms, relative difference and cosine.

Of an adapter, the change that it makes is compared, (alpha / rank) B A, not A and B: many pairs make the same change, at different
ranks too. It is never built: with QR factors of B and of A transposed, its Frobenius norm is that of a matrix of rank x rank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from gguf_tools.adapter import Adapter, read_adapter
from gguf_tools.errors import FileError
from gguf_tools.header import MODEL_LIMITS, Header, parse_header
from gguf_tools.mapping import forget, mapped
from gguf_tools.model import is_adapter
from gguf_tools.output import Progress
from gguf_tools.stream import row_slices

PIECE_VALUES = 1 << 20  # of a model's tensor at a time, 4 MiB of float32
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class TensorDifference:
    """Two tensors a and b of one name: Frobenius norms and the inner product; nothing is divided by a norm of zero."""

    name: str
    norm_a: float
    norm_b: float
    norm_difference: float
    inner: float

    @property
    def relative(self) -> float | None:
        """The norm of the difference as a part of a's."""
        return self.norm_difference / self.norm_a if self.norm_a else None

    @property
    def cosine(self) -> float | None:
        """1 for the same direction, 0 for unrelated, -1 for opposite."""
        product = self.norm_a * self.norm_b
        return min(1.0, max(-1.0, self.inner / product)) if product else None


@dataclass(frozen=True)
class Difference:
    """Two files: the tensors in both, and the names of those in one only."""

    kind: Literal["model", "adapter"]
    tensors: tuple[TensorDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def total(self) -> TensorDifference:
        """All common tensors as one vector."""
        squares = [(t.norm_a**2, t.norm_b**2, t.norm_difference**2, t.inner) for t in self.tensors]
        a, b, d, inner = (float(sum(column)) for column in zip(*squares, strict=True)) if squares else (0.0,) * 4
        return TensorDifference("all", a**0.5, b**0.5, d**0.5, inner)


def difference(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, progress: Progress | None = None
) -> Difference:
    """Compare two adapters, or two models of any types of quantisation; a piece of one tensor of each is in memory.

    Raises:
        FileError: one is damaged, they are not of a kind or architecture, or a common tensor differs in shape.
    """
    with mapped(a) as data_a, mapped(b) as data_b:
        first, second = parse_header(data_a, str(a), MODEL_LIMITS), parse_header(data_b, str(b), MODEL_LIMITS)
        kinds = [is_adapter(header) for header in (first, second)]
        if kinds[0] != kinds[1]:
            words = ["an adapter" if kind else "a model" for kind in kinds]
            raise FileError(f"{b}: is {words[1]}, but {a} is {words[0]}; only files of a kind can be compared.")
        archs = [header.text("general.architecture") for header in (first, second)]
        if archs[0] != archs[1]:
            raise FileError(f"{b}: is of the architecture {archs[1]!r:.80}, but {a} of {archs[0]!r:.80}.")
        if kinds[0]:
            return _of_adapters(str(a), str(b), read_adapter(a), read_adapter(b), progress)
        return _of_models(first, second, progress)


def _of_adapters(a: str, b: str, first: Adapter, second: Adapter, progress: Progress | None) -> Difference:
    common = [name for name in first.tensors if name in second.tensors]
    found = []
    for name in common:
        shapes = [(x.tensors[name][1].shape[0], x.tensors[name][0].shape[1]) for x in (first, second)]
        _check_shapes(a, b, name, *shapes)
        found.append(_change_difference(name, first, second))
        if progress is not None:
            progress(len(found), len(common))
    only = [tuple(n for n in x.tensors if n not in y.tensors) for x, y in ((first, second), (second, first))]
    return Difference("adapter", tuple(found), *only)


def _check_shapes(a: str, b: str, name: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    if first != second:
        raise FileError(f"{b}: {name} has shape {second}, but {first} in {a}.")


def _change_difference(name: str, first: Adapter, second: Adapter) -> TensorDifference:
    """With s B A of both: norms and inner product from small matrices, all in float64."""
    (a1, b1), (a2, b2) = ((x.astype(np.float64) for x in adapter.tensors[name]) for adapter in (first, second))
    s1, s2 = first.scale(name), second.scale(name)
    same = s1 == s2 and np.array_equal(a1, a2) and np.array_equal(b1, b2)
    inner = s1 * s2 * float(np.sum((b1.T @ b2) * (a1 @ a2.T)))
    apart = 0.0 if same else _product_norm(np.hstack([s1 * b1, -s2 * b2]), np.vstack([a1, a2]))
    return TensorDifference(name, abs(s1) * _product_norm(b1, a1), abs(s2) * _product_norm(b2, a2), apart, inner)


def _product_norm(b: Matrix, a: Matrix) -> float:
    """The Frobenius norm of b @ a: orthonormal factors do not change it, so only triangular ones are multiplied."""
    left: Matrix = np.asarray(np.linalg.qr(b, mode="r"))
    right: Matrix = np.asarray(np.linalg.qr(a.T, mode="r"))
    return float(np.linalg.norm(left @ right.T))


def _of_models(first: Header, second: Header, progress: Progress | None) -> Difference:
    common = [name for name in first.tensors if name in second.tensors]
    found = []
    for name in common:
        _check_shapes(first.label, second.label, name, first.tensors[name].shape, second.tensors[name].shape)
        sums = np.zeros(4)  # a.a, b.b, (a - b).(a - b), a.b
        for x, y in zip(_pieces(first, name), _pieces(second, name), strict=True):
            apart = x - y
            sums += [x @ x, y @ y, apart @ apart, x @ y]
        a, b, d, inner = map(float, sums)
        found.append(TensorDifference(name, a**0.5, b**0.5, d**0.5, inner))
        if progress is not None:
            progress(len(found), len(common))
    only = [tuple(n for n in x.tensors if n not in y.tensors) for x, y in ((first, second), (second, first))]
    return Difference("model", tuple(found), *only)


def _pieces(header: Header, name: str) -> Iterator[Matrix]:
    """A tensor's values in pieces of whole rows, flat; equal shapes give equal pieces."""
    entry = header.tensors[name]
    row_bytes = entry.size_bytes // math.prod(entry.shape[:-1])
    for start, end in row_slices(entry.shape, PIECE_VALUES):
        offset, n_bytes = entry.offset + start * row_bytes, (end - start) * row_bytes
        raw = np.frombuffer(header.data, np.uint8, n_bytes, offset).reshape(-1, row_bytes)
        yield _values(header.label, name, entry.type, raw).astype(np.float64).ravel()
        forget(header.data, offset, n_bytes)


def _values(label: str, name: str, kind: GGMLQuantizationType, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    if kind == GGMLQuantizationType.F64:
        return raw.view(np.float64).astype(np.float32)
    try:
        values: NDArray[np.float32] = dequantize(raw, kind)
    except NotImplementedError:
        raise FileError(f"{label}: {name} is of type {kind.name}, whose values cannot be read here.") from None
    return values
