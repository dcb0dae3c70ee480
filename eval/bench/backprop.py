"""Exact gradients of LLaMA-architecture GGUF models by back-propagation, in torch: a reference, not the product.

Benchmarks train with it (`train_adamw` is the honest baseline) and development asks it what the forward-only estimators should
find. Weights are dequantised once to float; matrices keep the row order of the file. llama.cpp permutes the q and k rows of
LLaMA models on conversion and rotates *neighbouring* pairs, so this module does the same and the rows of B mean the same in both.

A reader would question that nothing is padded: the tokens of a batch of sequences are laid end to end, so every matrix product
sees exactly the tokens that exist, and only attention (8 % of the time of a prefill of 160 tokens each) loops over the sequences.

Scope `answer` is a cache from `prefill` and tokens = invocation + answer + eos; scope `all` is no cache (None) and
tokens = prompt + invocation + answer + eos, with `n_invocation` counting prompt and invocation.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor

OnStep = Callable[[int, float, float], None]  # (step from 1, elapsed seconds, loss in nats before the update)


class TorchLlama:
    """Frozen weights by GGUF name, hyperparameters, and `shapes`: the (n_out, n_in) of each 2-D block weight."""

    def __init__(self, weights: dict[str, Tensor], metadata: Mapping[str, Any]) -> None:
        self.weights = weights
        self.shapes = {name: (w.shape[0], w.shape[1]) for name, w in weights.items() if name.startswith("blk.") and w.ndim == 2}
        self.n_layers = int(metadata["llama.block_count"])
        self.n_heads = int(metadata["llama.attention.head_count"])
        self.n_heads_kv = int(metadata.get("llama.attention.head_count_kv", self.n_heads))
        self.norm_eps = float(metadata["llama.attention.layer_norm_rms_epsilon"])
        self.head_dim = self.shapes["blk.0.attn_q.weight"][0] // self.n_heads
        if metadata.get("llama.rope.dimension_count", self.head_dim) != self.head_dim:
            raise ValueError("rope.dimension_count differs from the head size: partial rotation is not supported.")
        if metadata.get("llama.rope.scaling.type", "none") != "none":
            raise ValueError(f"rope.scaling.type is {metadata['llama.rope.scaling.type']!r}; only 'none' is supported.")
        base = float(metadata.get("llama.rope.freq_base", 10000.0))
        frequency = base ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        stretch = weights.get("rope_freqs.weight", torch.ones(1))  # the long-context factors of Llama 3.1
        self.rope_frequency = frequency / stretch.double()  # (head_dim / 2,) radians per position
        self.output = weights.get("output.weight", weights["token_embd.weight"])  # (n_vocab, n_embd), tied when absent

    @classmethod
    def from_gguf(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> "TorchLlama":
        """Read and dequantise (float64 is for finite differences). Raises ValueError for what this module does not compute."""
        reader = gguf.GGUFReader(path)
        metadata = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("tokenizer.")}
        if metadata["general.architecture"] != "llama":
            raise ValueError(f"{path}: architecture is {metadata['general.architecture']!r}, only 'llama' is supported.")
        odd = [t.name for t in reader.tensors if t.name.endswith(".bias") or "_exps." in t.name]
        if odd:
            raise ValueError(f"{path}: has {odd[0]}; biases and experts are not supported.")
        weights = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type), dtype=dtype) for t in reader.tensors}
        return cls(weights, metadata)


class Lora:
    """Low-rank deltas: W x becomes W x + scale * B (A x), with scale = alpha / rank.

    `weights` maps a block weight's GGUF name to (A, B) of shapes (rank, n_in) and (n_out, rank). The tensors are used as they
    are, not copied, so that a caller may write into them; `train` chooses which of them require gradients.
    """

    def __init__(self, weights: Mapping[str, tuple[Tensor, Tensor]], scale: float, *, train: Literal["b", "ab"]) -> None:
        self.weights, self.scale, self.train = dict(weights), scale, train
        for a, b in self.weights.values():
            a.requires_grad_(train == "ab")
            b.requires_grad_(True)

    def trained(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Tensors that require gradients, by GGUF name (`blk.0.attn_q.weight.lora_b`); of all modules or those in `names`."""
        return {
            f"{name}.lora_{letter}": tensor
            for name in (self.weights if names is None else names)
            for letter, tensor in zip("ab", self.weights[name], strict=True)
            if letter in self.train
        }


@dataclass(frozen=True)
class Cache:
    """Keys (rotated) and values of one prompt, computed with the adapter off."""

    keys: list[Tensor]  # per layer (n_heads_kv, n_prompt, head_dim)
    values: list[Tensor]  # the same


@dataclass(frozen=True)
class Example:
    """One training example; with an empty prompt and everything in `tokens` the scope is `all`."""

    prompt: list[int]  # adapter off
    tokens: list[int]  # adapter on: invocation + answer + eos
    n_invocation: int  # tokens[n_invocation] is the first predicted token


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Heads of x (n, heads * head_dim) with neighbouring pairs rotated by turn (n, 1, head_dim / 2), complex of modulus 1."""
    pairs = torch.view_as_complex(x.reshape(len(x), -1, turn.shape[-1], 2))
    return torch.view_as_real(pairs * turn).flatten(-2)  # (n, heads, head_dim)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last n of m positions: q (heads, n, dim), k and v (heads_kv, m, dim) -> (n, heads * dim)."""
    n, m, group = q.shape[1], k.shape[1], q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    mask = None if n == m else torch.ones(n, m, dtype=torch.bool).tril(m - n)
    mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None)
    return mixed[0].transpose(0, 1).flatten(1)


def _forward(
    model: TorchLlama,
    lora: Lora | None,
    sequences: Sequence[Sequence[int]],
    pasts: Sequence[Cache | None],
    *,
    kept: list[Cache] | None = None,
    seen: dict[str, Tensor] | None = None,
) -> Tensor:
    """Hidden states (n_tokens of all sequences, n_embd) after the last norm, sequences laid end to end.

    A list `kept` is filled with the sequences' own keys and values, and the last layer then stops at them (what is returned is
    meaningless). `seen` receives the inputs (n_tokens, n_in) of every block weight.
    """
    lengths = [len(s) for s in sequences]
    starts = [past.keys[0].shape[1] if past else 0 for past in pasts]
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    x = F.embedding(torch.tensor([token for s in sequences for token in s]), model.weights["token_embd.weight"])
    angle = torch.outer(positions.double(), model.rope_frequency)[:, None, :]
    turn = torch.polar(torch.ones_like(angle), angle).to(x.dtype.to_complex())
    if kept is not None:
        kept.extend(Cache([], []) for _ in sequences)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], model.weights[name], model.norm_eps)

    def linear(x: Tensor, name: str) -> Tensor:
        if seen is not None:
            seen[name] = x.detach()
        y = F.linear(x, model.weights[name])
        if lora is not None and name in lora.weights:
            a, b = lora.weights[name]
            y = y + F.linear(F.linear(x, a), lora.scale * b)
        return y

    def own(x: Tensor) -> tuple[Tensor, ...]:  # (heads, n, head_dim) of each sequence
        return torch.split(x.transpose(0, 1), lengths, 1)

    for layer in range(model.n_layers):
        block = f"blk.{layer}."
        h = norm(x, block + "attn_norm.weight")
        k = _rotate(linear(h, block + "attn_k.weight"), turn)
        v = linear(h, block + "attn_v.weight").reshape(len(h), -1, model.head_dim)
        ks, vs = own(k), own(v)
        if kept is not None:
            for cache, k_own, v_own in zip(kept, ks, vs, strict=True):
                cache.keys.append(k_own.contiguous())
                cache.values.append(v_own.contiguous())
            if layer == model.n_layers - 1:
                break
        q = _rotate(linear(h, block + "attn_q.weight"), turn)
        mixed = []
        for q_own, k_own, v_own, past in zip(own(q), ks, vs, pasts, strict=True):
            if past is not None:
                k_own, v_own = torch.cat([past.keys[layer], k_own], 1), torch.cat([past.values[layer], v_own], 1)
            mixed.append(_attend(q_own, k_own, v_own))
        x = x + linear(torch.cat(mixed), block + "attn_output.weight")
        h = norm(x, block + "ffn_norm.weight")
        gate = F.silu(linear(h, block + "ffn_gate.weight"))
        x = x + linear(gate * linear(h, block + "ffn_up.weight"), block + "ffn_down.weight")
    return norm(x, "output_norm.weight")


def prefill_batch(model: TorchLlama, prompts: Sequence[Sequence[int]]) -> list[Cache]:
    """Caches of several non-empty prompts from one pass, adapter off, without gradients."""
    kept: list[Cache] = []
    if prompts:
        with torch.no_grad():
            _forward(model, None, prompts, [None] * len(prompts), kept=kept)
    return kept


def prefill(model: TorchLlama, prompt_tokens: Sequence[int]) -> Cache:
    """Cache of one non-empty prompt, adapter off, without gradients."""
    return prefill_batch(model, [prompt_tokens])[0]


def _answer_logits(
    model: TorchLlama, lora: Lora | None, caches: Sequence[Cache | None], examples: Sequence[Example]
) -> tuple[Tensor, Tensor]:
    """Logits (n_answer of all examples, n_vocab) of the answer tokens, and those tokens (n_answer,); ignores `prompt`."""
    rows, targets, start = list[int](), list[int](), 0
    for e in examples:
        if not 1 <= e.n_invocation < len(e.tokens):
            raise ValueError(f"n_invocation is {e.n_invocation}; of {len(e.tokens)} tokens it must leave one and take one.")
        rows += range(start + e.n_invocation - 1, start + len(e.tokens) - 1)
        targets += e.tokens[e.n_invocation :]
        start += len(e.tokens) - 1
    hidden = _forward(model, lora, [e.tokens[:-1] for e in examples], caches)
    return F.linear(hidden[rows], model.output), torch.tensor(targets)


def answer_losses(model: TorchLlama, lora: Lora | None, cache: Cache | None, tokens: Sequence[int], n_invocation: int) -> Tensor:
    """Negative log-likelihood in nats of each of tokens[n_invocation:], shape (n_answer,); differentiable in the adapter."""
    logits, targets = _answer_logits(model, lora, [cache], [Example([], list(tokens), n_invocation)])
    return F.cross_entropy(logits, targets, reduction="none")


def example_losses(model: TorchLlama, lora: Lora | None, caches: Sequence[Cache | None], examples: Sequence[Example]) -> Tensor:
    """Mean nats per answer token of each example, shape (n_examples,), from one pass over all answers."""
    nll = F.cross_entropy(*_answer_logits(model, lora, caches, examples), reduction="none")
    return torch.stack([part.mean() for part in torch.split(nll, [len(e.tokens) - e.n_invocation for e in examples])])


def example_gradient(
    model: TorchLlama, lora: Lora, cache: Cache | None, tokens: Sequence[int], n_invocation: int
) -> dict[str, Tensor]:
    """Exact gradient of the mean nats per answer token, keyed and shaped as `lora.trained()`."""
    trained = lora.trained()
    loss = answer_losses(model, lora, cache, tokens, n_invocation).mean()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def layer_inputs(
    model: TorchLlama, lora: Lora | None, cache: Cache | None, tokens: Sequence[int], names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Inputs x (n_tokens, n_in) of block weights for the decoded tokens[:-1]: invocation and answer, eos is only predicted."""
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        _forward(model, lora, [tokens[:-1]], [cache], seen=seen)
    return {name: seen[name] for name in (model.shapes if names is None else names)}


def gauss_newton_trace(
    model: TorchLlama,
    lora: Lora,
    cache: Cache | None,
    tokens: Sequence[int],
    n_invocation: int,
    names: Sequence[str],
    n_samples: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Unbiased estimate, per module, of tr(J^T H J) of the mean nats per answer token, over the module's trained entries.

    J_t is the Jacobian of answer token t's logits and H_t = diag(p_t) - p_t p_t^T, so the trace is (1/T) sum_t tr(J_t^T H_t J_t).
    A label y ~ p_t has the score g_t(y) = d(-log p_t(y)) with mean zero and covariance J_t^T H_t J_t. Labels drawn independently
    for the T tokens make cross terms vanish in the mean, so one backward pass a sample is enough:

        trace = E[ |sum_t g_t(y_t)|^2 ] / T

    averaged over `n_samples` draws; the decoded tokens stay the true ones. One sample's standard deviation was 0.6 to 0.9 of the
    mean for an answer of 7 tokens. Martens 2014: with a softmax the Fisher matrix is the Gauss-Newton matrix.
    """
    wanted = {name: list(lora.trained([name]).values()) for name in names}
    flat = [tensor for tensors in wanted.values() for tensor in tensors]
    logits, targets = _answer_logits(model, lora, [cache], [Example([], list(tokens), n_invocation)])
    p = logits.detach().softmax(-1)
    totals = dict.fromkeys(wanted, 0.0)
    for _ in range(n_samples):
        loss = F.cross_entropy(logits, torch.multinomial(p, 1, generator=generator)[:, 0], reduction="sum")
        gradients = iter(torch.autograd.grad(loss, flat, retain_graph=True))
        for name, tensors in wanted.items():
            totals[name] += sum(float(next(gradients).square().sum()) for _ in tensors)
    return {name: total / (n_samples * len(targets)) for name, total in totals.items()}


def train_adamw(
    model: TorchLlama, lora: Lora, examples: Sequence[Example], lr: float, batch: int, seconds: float, on_step: OnStep
) -> None:
    """Train `lora` in place for `seconds`: AdamW without weight decay, the learning rate falling linearly to a twentieth.

    Each step takes the next `batch` examples in order, round and round, and minimises the mean over examples of the mean nats per
    answer token. The time that `on_step` takes, say for a held-out loss, is not counted.
    """
    parameters = list(lora.trained().values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    begun, step = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begun) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - 0.95 * elapsed / seconds)
        chosen = [examples[(step * batch + i) % len(examples)] for i in range(batch)]
        prefilled = iter(prefill_batch(model, [e.prompt for e in chosen if e.prompt]))
        loss = example_losses(model, lora, [next(prefilled) if e.prompt else None for e in chosen], chosen).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        reported = time.perf_counter()
        on_step(step, reported - begun, float(loss.detach()))
        begun += time.perf_counter() - reported
