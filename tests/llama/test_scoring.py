"""Objective f1: the loss is one minus the F1 of what the model would answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fwdllama.errors import UsageError
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.generate import generate
from fwdllama.llama.model import Model
from fwdllama.llama.oracle import LlamaOracle
from fwdllama.llama.scoring import ScoreOracle
from fwdllama.score import f1
from fwdllama.space import build_space
from fwdllama.types import Encoded
from gguf_tools.synth import write_tiny_llama

OPTIONS = ContextOptions(n_ctx_seq=256, n_seq=4, n_outputs=64, n_batch=128, n_threads=1)


@pytest.fixture
def oracle(tmp_path: Path) -> Iterator[LlamaOracle]:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path, type="F32")
    with Model(path) as model:
        shapes = {name: (s[0], s[1]) for name, (s, _) in model.info.tensors.items() if len(s) == 2}
        space = build_space(shapes, 3, modules=["q", "v"], layers=None, rank=2, alpha=4.0, train="b", seed=1)
        with LlamaOracle(model, space, "answer", OPTIONS) as opened:
            yield opened


def examples(model: Model) -> list[Encoded]:
    invocation, target = tuple(model.tokenize("\nA:")), (*model.tokenize("in a tree"), model.end)
    return [Encoded(str(i), tuple(model.tokenize(f"Where does number {i} live?")), invocation, target) for i in range(3)]


def test_the_loss_is_one_minus_f1_of_the_greedy_answer(oracle: LlamaOracle) -> None:
    batch = examples(oracle.model)
    scores = ScoreOracle(oracle)
    scores.load(batch)
    theta = np.random.default_rng(3).normal(0, 0.5, oracle.space.n_params).astype(np.float32)
    scores.write(theta)
    losses = scores.losses()
    n_most = 2 * len(batch[0].target) + 2
    told = generate(oracle.context, oracle.adapter, "answer", batch, max_new_tokens=n_most)
    for loss, tokens in zip(losses, told, strict=True):
        text = b"".join(oracle.model.piece(token) for token in tokens).decode(errors="ignore").strip().partition("\n")[0]
        assert loss == 1.0 - f1(text, ("in a tree",))


def test_a_classification_task_is_refused(oracle: LlamaOracle) -> None:
    example = Encoded("c", (5, 6, 7), (8,), (9,), choices=(9, 10))
    with pytest.raises(UsageError, match="objective nll"):
        ScoreOracle(oracle).load([example])
