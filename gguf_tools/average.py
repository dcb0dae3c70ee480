"""The weighted mean of adapters of one model.

An adapter changes W by (alpha / rank) B A, and the mean is that of the changes. It is an adapter again, exactly, in two cases. Where A is the same
in all, bit for bit, as in rounds of training that only move B: the mean of B, at the same rank. Otherwise by `concatenate`: all A on top of each
other and all B side by side, at the sum of the ranks. Averaging A and B apart would be neither, so without `concatenate` it is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_tools.adapter import BASE_KEY, Adapter, read_adapter, scale_of
from gguf_tools.errors import FileError
from gguf_tools.validate import MAX_RANK

Half = NDArray[np.float32]


def average_files(
    paths: Sequence[str | os.PathLike[str]], weights: Sequence[float] | None = None, *, concatenate: bool = False
) -> Adapter:
    """`average` of adapter files; the sentences name them.

    Raises:
        FileError: as `average`, or a file is no valid adapter.
    """
    return average([read_adapter(path) for path in paths], weights, concatenate=concatenate, labels=[str(path) for path in paths])


def average(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    concatenate: bool = False,
    labels: Sequence[str] | None = None,
) -> Adapter:
    """The adapter whose change is sum(w_i * change_i) / sum(w_i), equal weights by default.

    Alpha may differ: the result has the first one's, and each B is scaled to it. Metadata stays where all agree.

    Raises:
        FileError: fewer than two adapters, unfit weights, another base model, scope, invocation tokens, tensors or shapes, or
            A differs without `concatenate`, or the sum of the ranks is more than the matrix or llama.cpp can use.
    """
    names = list(labels) if labels is not None else [f"adapter {i}" for i in range(len(adapters))]
    if len(adapters) < 2:
        raise FileError(f"{len(adapters)} adapter was given, but a mean needs at least two.")
    parts = _parts(weights, len(adapters))
    for label, other in zip(names[1:], adapters[1:], strict=True):
        _check_same(names[0], adapters[0], label, other)
    first = adapters[0]
    tensors = {}
    for name in first.tensors:
        halves = [adapter.tensors[name] for adapter in adapters]
        scales = [part * adapter.scale(name) for part, adapter in zip(parts, adapters, strict=True)]
        odd = next((i for i, (a, _) in enumerate(halves) if not np.array_equal(a, halves[0][0])), None)
        if odd is None:
            tensors[name] = halves[0][0], _mean([b for _, b in halves], scales, first.scale(name))
        elif concatenate:
            tensors[name] = _joined(name, halves, scales, first.alpha, names[odd])
        else:
            raise FileError(
                f"{names[odd]}: {name}.lora_a differs from {names[0]}, so the mean of the two changes is not the product of mean A and "
                "mean B; --concatenate keeps it exactly, at the sum of the ranks."
            )
    common = {key: value for key, value in first.metadata.items() if all(other.metadata.get(key) == value for other in adapters)}
    return Adapter(first.architecture, first.alpha, tensors, first.scope, first.invocation_tokens, common)


def _parts(weights: Sequence[float] | None, n: int) -> list[float]:
    """Weights that add up to one."""
    if weights is None:
        return [1 / n] * n
    if len(weights) != n:
        raise FileError(f"{len(weights)} weights were given for {n} adapters; each has one.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        raise FileError(f"weights are {', '.join(f'{weight:g}' for weight in weights)}, but must be finite, not negative, and not all zero.")
    return [weight / sum(weights) for weight in weights]


def _check_same(label: str, first: Adapter, other_label: str, other: Adapter) -> None:
    """What must be equal for a mean to make sense."""
    for what, one, two in (
        ("was made for the architecture", first.architecture, other.architecture),
        ("has the base model", first.metadata.get(BASE_KEY), other.metadata.get(BASE_KEY)),
        ("has the scope", first.scope, other.scope),
        ("has the invocation tokens", list(first.invocation_tokens), list(other.invocation_tokens)),
    ):
        if one is not None and two is not None and one != two:
            raise FileError(f"{other_label}: {what} {two}, but {label} {one}.")
    lacking = sorted(first.tensors.keys() ^ other.tensors.keys())
    if lacking:
        has, lacks = (label, other_label) if lacking[0] in first.tensors else (other_label, label)
        raise FileError(f"{lacks}: does not adapt {lacking[0]}, but {has} does; only adapters of the same space have a mean.")
    for name, (a, b) in first.tensors.items():
        other_a, other_b = other.tensors[name]
        shapes = (b.shape[0], a.shape[1]), (other_b.shape[0], other_a.shape[1])
        if shapes[0] != shapes[1]:
            raise FileError(f"{other_label}: adapts {name} of shape {shapes[1]}, but {label} one of {shapes[0]}.")


def _mean(halves: Sequence[Half], scales: Sequence[float], scale: float) -> Half:
    """B such that `scale` B is the weighted sum; summed in float64 and rounded once."""
    total = np.zeros(halves[0].shape)
    for b, factor in zip(halves, scales, strict=True):
        total += factor * b.astype(np.float64)
    return (total / scale).astype(np.float32)


def _joined(name: str, halves: Sequence[tuple[Half, Half]], scales: Sequence[float], alpha: float, label: str) -> tuple[Half, Half]:
    """A (sum of ranks, n_in) and B (n_out, sum of ranks), B scaled so that alpha / rank undoes it."""
    rank = sum(a.shape[0] for a, _ in halves)
    most = min(MAX_RANK, halves[0][0].shape[1], halves[0][1].shape[0])
    if rank > most:
        raise FileError(f"{label}: {name} would have rank {rank}, but at most {most} is of use; average fewer adapters.")
    scale = scale_of(alpha, rank)
    b = np.hstack([factor / scale * half.astype(np.float64) for (_, half), factor in zip(halves, scales, strict=True)])
    return np.vstack([a for a, _ in halves]), b.astype(np.float32)
