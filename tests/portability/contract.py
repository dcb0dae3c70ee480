"""What every machine must compute alike, byte for byte, because devices, aggregators and readers of a ledger exchange seeds and digests instead.

All of it is integers and single IEEE operations in a fixed order. Sums that a linear algebra library orders as it likes, and functions like
`exp` that every C library rounds in its own way, are in `PRIVATE`: machines may differ there, and what they send is the result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from fwdllama_server.aggregate import Contribution, Learner, merge
from numpy.typing import NDArray

from fwdllama.batches import grouped, shuffled
from fwdllama.direction import each_packed, packed_bits, unpack
from fwdllama.estimator import slopes_of
from fwdllama.federation.message import CheckIn, Task, TrainResult, theta_digest
from fwdllama.federation.signature import device_key, headers
from fwdllama.federation.toy import toy_run
from fwdllama.federation.worker import short
from fwdllama.ledger import Entry, Ledger, digest, replay, restoring
from fwdllama.llama.activation import principal_rows
from fwdllama.loss import bounded, token_nll
from fwdllama.pacing import VarianceGate
from fwdllama.sampler import Sampler, seeds_at
from fwdllama.space import Space, build_space
from fwdllama.step import StepState, clipped, coefficients, combined, learning_rate
from gguf_tools.adapter import Adapter, adapter_bytes
from gguf_tools.average import average
from gguf_tools.model import read_model_info
from gguf_tools.peft import write_peft
from gguf_tools.synth import write_tiny_llama

SEEDS = (0, 7, 1 << 63, (1 << 64) - 1)
SIZES = (1, 63, 64, 65, 1_001, 262_147)
SMALLEST = np.float32(1e-42)  # a subnormal number: a machine that flushes them to zero replays another theta
SHAPES = {f"blk.{i}.{name}.weight": shape for i in range(3) for name, shape in (("attn_q", (24, 16)), ("ffn_down", (16, 40)))}


def numbers(seed: int, n: int) -> NDArray[np.float32]:
    """Any n numbers in [-1, 1) that need no arithmetic library: the top bits of raw words."""
    words = np.random.Philox(key=seed).random_raw(n)
    return ((words >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23)) - np.float32(1.0)


def space(train: str = "b") -> Space:
    """Three layers of two matrices."""
    return build_space(SHAPES, 3, modules=["q", "down"], layers=None, rank=4, alpha=8.0, train="ab" if train == "ab" else "b", seed=7)


def entries(n: int = 200) -> list[Entry]:
    """Steps of ten probes, coefficients of every size down to subnormal ones, and three of them taken back."""
    found = []
    for step in range(n):
        values = numbers(step, 10) * np.float32(0.1)
        values[step % 10] = SMALLEST * np.float32(step)
        found.append(restoring(step, step - 2) if step in (50, 51, 120) else Entry(step, np.array(seeds_at(3, step, 0, 10), np.uint64), values))
    return found


def adapter() -> Adapter:
    """The adapter of a replayed theta."""
    theta = replay(space("ab").initial_theta(), entries(20))
    return Adapter("llama", 8.0, space("ab").tensors(theta), "answer", (9, 10), {"fwdllama.base.sha256": "0" * 64})


def _directions() -> bytes:
    return b"".join(packed_bits(seed, n).tobytes() + unpack(packed_bits(seed, n), n).astype("<f4").tobytes() for seed in SEEDS for n in SIZES)


def _seeds() -> bytes:
    aligned = Sampler(5, candidates=4).seeds(2, 0, 40, numbers(1, 4_099) * np.float32(1e-3))
    return np.array([*seeds_at(5, 2, 0, 100), *aligned], "<u8").tobytes()


def _batches() -> bytes:
    orders = b"".join(shuffled(seed, epoch, 1_000).astype("<i8").tobytes() for seed in (0, 9) for epoch in range(3))
    rows = [None] * 40
    return orders + repr([grouped(rows, size, shift) for size in (1, 4) for shift in range(3)]).encode()


def _initial() -> bytes:
    return b"".join(a.astype("<f4").tobytes() for a in space().initial_a().values()) + space("ab").initial_theta().astype("<f4").tobytes()


def _update() -> bytes:
    values = np.append(numbers(4, 99), SMALLEST)
    return combined(each_packed(range(100), 10_007), values, 10_007).astype("<f4").tobytes()


def _theta() -> bytes:
    return theta_digest(replay(space("ab").initial_theta(), entries())).encode()


def _ledger() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger.create(Path(folder) / "ledger.bin", bytes(32))
        for entry in entries(60):
            ledger.append(entry)
        return ledger.path.read_bytes() + digest(bytes(32), entries(60))


def _adapters() -> bytes:
    made = adapter()
    return adapter_bytes(made) + adapter_bytes(average([made, made], [0.3, 0.6]))


def _peft() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = read_model_info(write_tiny_llama(folder / "base.gguf"))
        shapes = {f"blk.{i}.{part}.weight": base.tensors[f"blk.{i}.{part}.weight"][0] for i in range(2) for part in ("attn_q", "ffn_down")}
        pairs = {tensor: (numbers(1, 4 * n_in).reshape(4, n_in), numbers(2, 4 * n_out).reshape(n_out, 4)) for tensor, (n_out, n_in) in shapes.items()}
        write_peft(folder / "peft", Adapter("llama", 8.0, pairs), base)
        return b"".join(path.read_bytes() for path in sorted((folder / "peft").iterdir()))


def _requests() -> bytes:
    key = device_key(b"secret", "d1")
    body = CheckIn(base="0" * 64, examples=9, battery=0.3, charging=False).model_dump_json().encode()
    return repr([headers("d1", key, method, "/v1/runs/r1?from=3", body, 1 << 60, 1234567890.0625) for method in ("GET", "put")]).encode() + body


def _results() -> bytes:
    losses = [short(float(value) * 7.3) for value in numbers(8, 50)]
    result = TrainResult(theta_digest="0" * 64, plus=losses, minus=losses[::-1], examples=(4,) * 5, loss=losses[0], n_tokens=9)
    task = Task(task="t1", run="r1", kind="train", version=4, theta_digest="0" * 64, seeds=SEEDS, lease_s=0.1)
    return result.model_dump_json().encode() + task.model_dump_json().encode()


def _genesis() -> bytes:
    spec, initial = toy_run("golden", 129, eps=0.1 + 0.2)
    return spec.genesis() + spec.model_dump_json().encode() + initial


def _slopes() -> bytes:
    plus, minus = numbers(1, 400).astype(np.float64) + 2.1, numbers(2, 400).astype(np.float64) + 2.1
    plus[7] = np.nan
    group = np.arange(400) % 20
    found = [slopes_of(plus, minus, group, 0.003, sided) for sided in ("one", "two")]
    return b"".join(slopes.astype("<f8").tobytes() + clipped(slopes).astype("<f8").tobytes() for slopes in found)


def _steps() -> bytes:
    slopes = clipped(numbers(3, 333).astype(np.float64) * 0.7)
    state = StepState(0.3).updated(slopes)
    lr = learning_rate(0.05, fraction=0.3, final=0.1, n_probes=1234, half_life=800)
    wanted = VarianceGate(1e-3, 8, 100_000).wanted(slopes)
    return coefficients(slopes, lr, state.mean_square or 0.0, 3).astype("<f4").tobytes() + repr((state, lr, wanted)).encode()


def contributions(lags: Sequence[int]) -> list[Contribution]:
    """Three devices that measured the same seeds."""
    found = []
    for i, lag in enumerate(lags):
        plus, minus = (tuple(float(value) + 2.0 for value in numbers(10 * i + side, 40)) for side in (1, 2))
        result = TrainResult(theta_digest="0" * 64, plus=plus, minus=minus, examples=(4, 3, 2, 4), loss=2.1, n_tokens=9)
        found.append(Contribution(f"d{i}", np.array(seeds_at(1, lag, 0, 40), np.uint64), result, lag))
    return found


def merged(lags: Sequence[int]) -> bytes:
    """A round's entry by every rule of aggregation."""
    found = []
    for rule in ("clip", "mean", "median", "trimmed"):
        shape = {"copies": 1 if rule == "clip" else 3}
        train = {"estimator": {"sided": "two", "examples_per_probe": 4}, "step": {"lr": 0.05, "half_life": 800}}
        spec, _ = toy_run("toy", 8, round=shape, train=train, aggregation={"rule": rule})
        outcome = merge(contributions(lags), spec, Learner(0.4, 99), 5, 0.25)
        found.append(outcome.entry.payload() + repr((outcome.learner, outcome.loss, outcome.gradient_rms, outcome.lr)).encode())
    return b"".join(found)


def _models() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        kinds = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
        return b"".join(write_tiny_llama(Path(folder) / f"{kind}.gguf", type=kind).read_bytes() for kind in kinds)


CONTRACT: Mapping[str, Callable[[], bytes]] = {
    "directions": _directions,
    "seeds of probes": _seeds,
    "order of examples": _batches,
    "initial A and theta": _initial,
    "update of a step": _update,
    "theta replayed from a ledger": _theta,
    "ledger": _ledger,
    "adapters": _adapters,
    "adapter for peft": _peft,
    "signed requests": _requests,
    "tasks and results": _results,
    "specification of a run": _genesis,
    "slopes": _slopes,
    "coefficients and pacing": _steps,
    "entry of a round": lambda: merged((0, 0, 0)),
    "random models": _models,
}


def _logits() -> NDArray[np.float32]:
    return numbers(6, 64 * 999).reshape(64, 999) * np.float32(9)


PRIVATE: Mapping[str, Callable[[], bytes]] = {
    "losses from logits (exp, log)": lambda: token_nll(_logits(), np.arange(64, dtype=np.int32)).tobytes(),
    "bounded losses (expm1)": lambda: bounded(numbers(5, 999).astype(np.float64) * 9, 2.0).tobytes(),
    "principal directions (LAPACK)": lambda: principal_rows(numbers(2, 60 * 32).reshape(60, 32), 4).tobytes(),
    "entry of a round with late results (pow)": lambda: merged((0, 1, 2)),
}
