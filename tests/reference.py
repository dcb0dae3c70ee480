"""Slow, obvious versions of what the package does cleverly; the tests hold the two against each other.

Nothing here calls the code under test: Philox is written out in Python integers, steps are loops over float32
numbers, and the LLaMA model is a matrix at a time in float64, without a KV cache, batches or padding.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from fwdllama.types import Encoded, Scope

_WORD = (1 << 64) - 1


def philox_words(key: tuple[int, int], counter: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Iterator[int]:
    """The raw words of Philox4x64-10 (Salmon et al. 2011), the counter raised by one before every block of four."""
    at = sum(word << (64 * i) for i, word in enumerate(counter))
    while True:
        at += 1
        block = [(at >> (64 * i)) & _WORD for i in range(4)]
        k0, k1 = key
        for _ in range(10):
            low, high = block[0] * 0xD2E7470EE14C6C93, block[2] * 0xCA5A826395121157
            block = [(high >> 64) ^ block[1] ^ k0, high & _WORD, (low >> 64) ^ block[3] ^ k1, low & _WORD]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _WORD, (k1 + 0xBB67AE8584CAA73B) & _WORD
        yield from block


def signs(seed: int, n_params: int) -> list[int]:
    """The direction of `seed`, one bit at a time: least significant first, a set bit is -1."""
    words = philox_words((seed, 0))
    drawn: list[int] = []
    while len(drawn) < n_params:
        word = next(words)
        drawn += [-1 if word >> bit & 1 else 1 for bit in range(64)]
    return drawn[:n_params]


def stepped(theta: Sequence[float], seeds: Sequence[int], coefficients: Sequence[float]) -> list[np.float32]:
    """theta - sum_i a_i z_i, every addition rounded to float32, the sum first."""
    total = [np.float32(0.0) for _ in theta]
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        for i, sign in enumerate(signs(seed, len(theta))):
            total[i] = np.float32(total[i] + np.float32(coefficient) * np.float32(sign))
    return [np.float32(np.float32(t) - s) for t, s in zip(theta, total, strict=True)]


def limited(slopes: Sequence[float], width: float = 3.0) -> list[float]:
    """Slopes pulled to median +- width x 1.4826 MAD, NaN to zero."""
    usable = [slope for slope in slopes if not math.isnan(slope)]
    if not usable:
        return [0.0 for _ in slopes]
    middle = statistics.median(usable)
    reach = width * 1.4826 * statistics.median(abs(slope - middle) for slope in usable)
    return [0.0 if math.isnan(s) else min(max(s, middle - reach), middle + reach) for s in slopes]


def nll(logits: Sequence[float], target: int) -> float:
    """-log softmax(logits)[target], exactly summed."""
    peak = max(logits)
    return math.log(math.fsum(math.exp(x - peak) for x in logits)) + peak - logits[target]


class TinyLlama:
    """The LLaMA model of an F32 GGUF with tied embeddings, computed in float64."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.weights = {t.name: np.array(t.data, np.float64) for t in reader.tensors}
        self.n_layers, self.n_head, self.n_head_kv = (
            int(reader.fields[f"llama.{key}"].contents())
            for key in ("block_count", "attention.head_count", "attention.head_count_kv")
        )
        self.epsilon = float(reader.fields["llama.attention.layer_norm_rms_epsilon"].contents())

    def logits(
        self,
        tokens: Sequence[int],
        adapter: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]] | None = None,  # name -> A, B
        scale: float = 0.0,  # alpha / rank
        on_from: int = 0,  # position of the first token for which the adapter is on
    ) -> NDArray[np.float64]:
        """Logits (n_tokens, n_vocab) after every token."""
        n, pairs = len(tokens), adapter or {}
        on = (np.arange(n) >= on_from)[:, None]

        def times(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
            y = x @ self.weights[name].T
            if name in pairs:
                a, b = (part.astype(np.float64) for part in pairs[name])
                y = y + on * scale * (x @ a.T @ b.T)
            return y

        x = self.weights["token_embd.weight"][list(tokens)]
        for layer in range(self.n_layers):
            block = f"blk.{layer}."
            normed = self._normed(x, f"{block}attn_norm.weight")
            q, k = (self._rotated(times(f"{block}attn_{m}.weight", normed), h) for m, h in self._heads("q", "k"))
            v = times(f"{block}attn_v.weight", normed).reshape(n, self.n_head_kv, -1)
            mixed = np.empty_like(q)
            for head in range(self.n_head):
                source = head * self.n_head_kv // self.n_head
                scores = q[:, head] @ k[:, source].T / math.sqrt(q.shape[2])
                scores[np.triu_indices(n, 1)] = -np.inf
                mixed[:, head] = _softmax(scores) @ v[:, source]
            x = x + times(f"{block}attn_output.weight", mixed.reshape(n, -1))
            normed = self._normed(x, f"{block}ffn_norm.weight")
            gate, up = times(f"{block}ffn_gate.weight", normed), times(f"{block}ffn_up.weight", normed)
            x = x + times(f"{block}ffn_down.weight", gate / (1 + np.exp(-gate)) * up)
        logits: NDArray[np.float64] = self._normed(x, "output_norm.weight") @ self.weights["token_embd.weight"].T
        return logits

    def loss(
        self,
        example: Encoded,
        adapter: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
        scale: float,
        scope: Scope,
    ) -> float:
        """Mean loss per target token, or that of the right label among the choices."""
        tokens = example.prompt + example.invocation + example.target[:-1]
        on_from = len(example.prompt) if scope == "answer" else 0
        rows = self.logits(tokens, adapter, scale, on_from)[-len(example.target) :].tolist()
        if example.choices:
            return nll([rows[0][c] for c in example.choices], example.choices.index(example.target[0]))
        return statistics.fmean(nll(row, target) for row, target in zip(rows, example.target, strict=True))

    def _heads(self, *modules: str) -> list[tuple[str, int]]:
        return [(module, self.n_head if module == "q" else self.n_head_kv) for module in modules]

    def _normed(self, x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        scaled: NDArray[np.float64] = (
            x / np.sqrt((x**2).mean(axis=1, keepdims=True) + self.epsilon) * self.weights[name]
        )
        return scaled

    def _rotated(self, x: NDArray[np.float64], n_heads: int) -> NDArray[np.float64]:
        """Rotary positions over neighbouring pairs; (n, n_heads * d) becomes (n, n_heads, d)."""
        heads = x.reshape(len(x), n_heads, -1)
        d = heads.shape[2]
        angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        even, odd = heads[:, :, 0::2], heads[:, :, 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=3).reshape(heads.shape)


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    normalised: NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True)
    return normalised
