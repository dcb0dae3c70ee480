"""Several thetas in one decode: every run of its sequences is computed with an adapter of its own.

llama.cpp has one adapter a context, so a probe of one example is a decode of ten tokens, in which the weights are fetched for hardly any
arithmetic. But an adapted matrix is two small products beside the large one, and ggml's products take a stack of matrices as well as one:

    (n_out, rank) x (n_tokens, rank)  ->  (n, n_out, rank) x (n, n_tokens / n, rank)

So while a decode's graph is shown node by node (`cb_eval`), the nodes that read an adapter's tensors are made to read a stack of ours
instead; the large products, attention and everything else are shared. What each row gets is, to the last bit, what it would get alone.
The graph is put back after every decode, because llama.cpp may use it again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import EngineError
from fwdllama.llama.adapter import LoadedAdapter, Values
from fwdllama.llama.binding import TensorHead

F32 = 0  # enum ggml_type
_SOURCES = TensorHead.src.offset


@dataclass
class _Layer:
    """One trained tensor: what a node that reads it reads instead, and the numbers behind that, (n_places, rows, columns)."""

    head: TensorHead
    values: NDArray[np.float32]


class Stack:
    """`n_places` thetas of an adapter's trained tensors, and the eyes that put them into a context's graphs.

    Raises:
        EngineError: the adapter's tensors are not plain memory of this process, so that nothing can be laid beside them.
    """

    def __init__(self, adapter: LoadedAdapter, shapes: Mapping[str, tuple[int, ...]], n_places: int) -> None:
        """`shapes` are those of the trained tensors, by name: (n_out, rank) of a B, (rank, n_in) of an A."""
        self.n_places = n_places
        self._layers: dict[str, _Layer] = {}
        self._by_address: dict[int, _Layer] = {}
        for name, shape in shapes.items():
            address = adapter.addresses.get(name)
            if address is None:
                raise EngineError(f"{name} is not in this process's own memory.")
            values = np.zeros((n_places, *shape), np.float32)
            layer = _Layer(_copy(TensorHead.from_address(address)), values)
            layer.head.data = values.ctypes.data
            self._layers[name] = self._by_address[address] = layer
        self._active: tuple[int, tuple[int, ...]] | None = None  # places in use, columns of each: its tokens, or those that have logits
        self._patched: list[tuple[TensorHead, bytes]] = []  # nodes that were changed, and what they were
        self._kept: list[TensorHead] = []  # heads that they point to
        self._flat: dict[int, TensorHead] = {}  # address of a changed node -> what it looked like, for those that read it
        self._n_seen = 0
        self._odd: str | None = None

    def write(self, place: int, values: Values) -> None:
        """Put one theta's tensors at `place`."""
        for name, new in values.items():
            self._layers[name].values[place] = new

    def values(self, place: int) -> Values:
        """What was written at `place`."""
        return {name: layer.values[place] for name, layer in self._layers.items()}

    def look(self, address: int, ask: bool, _user_data: object) -> bool:
        """llama.cpp shows a node before it is computed; never ask for its data, so that the graph stays whole."""
        if ask and self._active is not None:
            sources = (ctypes.c_size_t * 2).from_address(address + _SOURCES)
            layer = self._by_address.get(sources[0])
            if layer is not None:
                self._widen(address, layer, *self._active)
            elif sources[0] in self._flat:  # the product's only reader, a scaling, sees it as before
                node = TensorHead.from_address(address)
                self._patched.append((node, bytes(node)))
                sources[0] = ctypes.addressof(self._flat[sources[0]])
        return not ask

    def _widen(self, address: int, layer: _Layer, n: int, columns: tuple[int, ...]) -> None:
        """Make a product of one matrix a product of n, each with the columns that are its own."""
        node = TensorHead.from_address(address)
        given = TensorHead.from_address(node.src[1])
        flat = self._flat.get(node.src[1], given)
        n_own = next((each for each in columns if flat.ne[1] == n * each), None)
        if flat.type != F32 or node.type != F32 or n_own is None or flat.nb[1] != 4 * flat.ne[0] or flat.ne[2] * flat.ne[3] != 1:
            self._odd = f"{bytes(layer.head.name).decode()} is given {flat.ne[1]} columns of type {flat.type} where {n} times {columns} were expected"
            return
        was = bytes(node)
        self._flat[address] = _copy(node)
        _shape(layer.head, layer.values.shape[2], layer.values.shape[1], n)
        source = _copy(flat)
        _shape(source, flat.ne[0], n_own, n)
        self._kept.append(source)
        node.src[0], node.src[1] = ctypes.addressof(layer.head), ctypes.addressof(source)
        _shape(node, node.ne[0], n_own, n)
        self._patched.append((node, was))
        self._n_seen += 1

    @contextmanager
    def beside(self, first: int, n: int, n_tokens: int, n_outputs: int) -> Iterator[None]:
        """While this is open, the first n_tokens tokens of a decode see the theta of place `first`, the next of the one after it, n in all.

        The last layer may go on with the tokens that have logits alone, of which each place then has n_outputs.

        Raises:
            EngineError: at its end, where the graph was not what it must be; the logits are then worth nothing.
        """
        for layer in self._layers.values():
            layer.head.data = layer.values[first:].ctypes.data
        self._active, self._n_seen, self._odd = (n, (n_tokens, n_outputs)), 0, None
        try:
            yield
        finally:
            self._active = None
            for node, was in reversed(self._patched):
                ctypes.memmove(ctypes.addressof(node), was, len(was))
            self._patched, self._kept, self._flat = [], [], {}
        if self._odd is not None:
            raise EngineError(self._odd)
        if self._n_seen != len(self._layers):
            raise EngineError(f"{self._n_seen} of {len(self._layers)} adapted tensors were seen in the graph")


def _copy(head: TensorHead) -> TensorHead:
    return TensorHead.from_buffer_copy(head)


def _shape(head: TensorHead, columns: int, rows: int, n: int) -> None:
    """A contiguous float32 tensor of n times rows times columns."""
    for i, (size, step) in enumerate(((columns, 4), (rows, 4 * columns), (n, 4 * columns * rows), (1, 4 * columns * rows * n))):
        head.ne[i], head.nb[i] = size, step
