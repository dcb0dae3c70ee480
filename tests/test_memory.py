from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwdllama.config import make_config
from fwdllama.errors import UsageError
from fwdllama.llama.adapter import LoadedAdapter
from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.memory import Phase, Plan, Shape, engine_options, evaluation, to_load, training
from fwdllama.setting import Setting, cheapest, smallest
from fwdllama.shortlist import USUAL
from gguf_tools.adapter import Adapter
from gguf_tools.graph import compute_bytes
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.plan import Item, Part, Sizes, decode_of, kv_bytes, repacked_types, tensor_bytes, weight_items
from gguf_tools.synth import write_tiny_llama

MIB = 1 << 20
WORDS = re.compile(r"(\S+) (model|KV|compute|output)? ?buffer size = +([\d.]+) MiB")


def said(caplog: pytest.LogCaptureFixture, kind: str) -> dict[str, float]:
    """What llama.cpp wrote about its buffers of one kind: bytes by buffer type, the last word on each."""
    found = {}
    for record in caplog.records:
        match = WORDS.search(record.getMessage())
        if match and match[2] == kind:
            found[match[1]] = float(match[3]) * MIB
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose feed-forward part is wide and whose heads share keys."""
    path = tmp_path_factory.mktemp("models") / "wide.gguf"
    return write_tiny_llama(path, n_layers=4, n_embd=256, n_head=4, n_head_kv=2, n_ff=1024, n_vocab=2000)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(
    ("n_ctx", "n_seq", "n_outputs", "n_batch", "kv_type"),
    [
        (256, 1, 1, 512, "f16"),
        (256, 5, 64, 512, "f16"),
        (1024, 2, 64, 512, "f16"),  # attention's scores are the largest
        (256, 72, 72, 512, "f16"),  # tokens are rounded up to a multiple of the sequences
        (512, 3, 64, 64, "f32"),
        (512, 2, 64, 512, "q8_0"),  # flash attention, and heads that are rotated
    ],
)
def test_compute_buffers_and_caches_are_as_large_as_llama_cpp_says(
    wide: Path, caplog: pytest.LogCaptureFixture, n_ctx: int, n_seq: int, n_outputs: int, n_batch: int, kv_type: str, rank: int
) -> None:
    flash = kv_type == "q8_0"
    options = ContextOptions(n_ctx, n_seq, n_outputs, n_batch, 1, kv_type, flash)
    sizes = Sizes(n_ctx, n_seq, n_outputs, n_batch, kv_type, flash)
    info = read_model_info(wide)
    with Model(wide) as model:
        adapter = LoadedAdapter(model, everything(info, rank)) if rank else None
        caplog.set_level(logging.DEBUG, "fwdllama.llama.cpp")
        with Context(model, options) as context:
            if adapter is not None:
                adapter.attach(context, True)  # the next decode reserves anew
                row = np.arange(2, dtype=np.int32)
                context.decode(row + 1, row, np.zeros(2, np.int32), np.array([0, 1], np.int8))
            caplog.set_level(logging.NOTSET, "fwdllama.llama.cpp")
        if adapter is not None:
            adapter.close()
    printed = 0.005 * MIB
    assert compute_bytes(info, decode_of(sizes, rank)) == pytest.approx(said(caplog, "compute")["CPU"], abs=printed)
    assert kv_bytes(Part.whole(info), sizes) == pytest.approx(said(caplog, "KV")["CPU"], abs=printed)


def everything(info: ModelInfo, rank: int) -> Adapter:
    matrices = {name: shape for name, (shape, _) in info.tensors.items() if name.startswith("blk.") and len(shape) == 2}
    return Adapter(
        "llama", 8.0, {n: (np.zeros((rank, shape[1]), np.float32), np.zeros((shape[0], rank), np.float32)) for n, shape in matrices.items()}
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("mmap", "repack"), [(False, True), (False, False), (True, True), (True, False)])
def test_weights_take_what_llama_cpp_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mmap: bool, repack: bool, tied: bool
) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", n_embd=256, n_ff=512, n_vocab=2000, type="Q4_0", tied=tied)
    caplog.set_level(logging.DEBUG, "fwdllama.llama.cpp")
    with Model(path, ModelOptions(mmap=mmap, repack=repack)):
        caplog.set_level(logging.NOTSET, "fwdllama.llama.cpp")
    found = said(caplog, "model")
    planned = {item.name: item for item in weight_items(Part.whole(read_model_info(path)), "w", mmap=mmap, repack=repack)}
    assert sum(item.size_bytes for item in planned.values()) == pytest.approx(sum(found.values()), rel=0.02)
    assert ("CPU_REPACK" in found) == ("w, rearranged for this CPU" in planned)
    assert any(item.mapped for item in planned.values()) == mmap


def test_parts_share_the_layer_they_are_cut_at_and_both_have_the_embeddings(wide: Path) -> None:
    info = read_model_info(wide)
    trunk, top = Part(info, 0, 2), Part(info, 1, info.n_layers)
    shared = sum(tensor_bytes(*entry) for name, entry in info.tensors.items() if name.startswith("blk.1.") or not name.startswith("blk."))
    assert trunk.weight_bytes() + top.weight_bytes() == Part.whole(info).weight_bytes() + shared
    assert set(trunk.tensors) | set(top.tensors) == set(info.tensors)


def config(**values: Mapping[str, Any]) -> Any:
    return make_config({"budget": {"steps": 1}, **values})


def sizes_of(phase: Phase) -> dict[str, int]:
    return {re.sub(r",.*| layers.*", "", item.name): item.size_bytes for item in phase.items}


def test_training_holds_two_parts_and_evaluating_one_model(wide: Path) -> None:
    info = read_model_info(wide)
    shape = Shape.expected(config(), 256, info.n_vocab)
    assert (shape.n_seq, shape.unit_size) == (75, 5)  # 32 watched examples are seven paragraphs of five
    plan = training(info, config(), shape)
    assert [phase.name for phase in plan.phases] == ["choosing A", "training"]
    names = [item.name for item in plan.phases[-1].items]
    assert "weights of layers 1 to 3, read" in names
    assert "weights of layers 0 to 0, read" in names
    # 75 sequences of the three upper layers, 5 of the lower one
    caches = [item.size_bytes for item in plan.phases[-1].items if item.name.startswith("KV cache")]
    assert sorted(caches) == sorted(n * 256 * layers * 2 * 2 * 64 * 2 for n, layers in ((75, 3), (5, 1)))
    whole = evaluation(info, engine_options(batch=8, n_ctx=256, n_threads=1), ModelOptions())
    assert [item.name for item in whole.peak.items if item.name.startswith("weights")] == ["weights of the model, read"]


@pytest.mark.parametrize(
    "values",
    [
        {"engine": {"trunk": False}},
        {"space": {"layers": (0, 1)}},  # nothing lies below
        {"estimator": {"objective": "f1"}},  # generates, which needs the whole model
    ],
)
def test_a_run_without_a_trunk_holds_the_whole_model_once(wide: Path, values: dict[str, Any]) -> None:
    info = read_model_info(wide)
    plan = training(info, config(**values), Shape.expected(config(), 256, info.n_vocab))
    assert [phase.name for phase in plan.phases] == ["choosing A", "training"]
    names = [item.name for item in plan.peak.items]
    assert [name for name in names if name.startswith("weights")] == ["weights of the model, read"]
    assert not any(name.startswith("values between") for name in names)


def test_a_shortlist_takes_its_share_of_output_and_logits(wide: Path) -> None:
    info = read_model_info(wide)
    assert Shape.expected(config(), 256, info.n_vocab).n_logits is None
    assert Shape.expected(config(), 256, 128_256).n_logits == USUAL
    assert Shape.expected(config(), 256, 128_256, n_logits=8192).n_logits == 8192
    assert Shape.expected(config(estimator={"vocabulary": "whole"}), 256, 128_256, n_logits=8192).n_logits is None
    whole = Shape.expected(config(), 256, info.n_vocab)
    found = [training(info, config(), shape).phases[-1].items for shape in (whole, replace(whole, n_logits=500))]
    names = ("weights of layers 1 to 3", "logits of layers 1 to 3")
    weights, logits = ([next(item.size_bytes for item in items if item.name.startswith(name)) for items in found] for name in names)
    assert weights[0] - weights[1] == tensor_bytes((1500, info.n_embd), info.quantisation)
    assert logits == [75 * 4 * 2000, 75 * 4 * 500]


def test_a_setting_of_a_run_knows_how_many_tokens_its_data_are_made_of(wide: Path) -> None:
    info = read_model_info(wide)
    few, usual = (Setting.of(config(), replace(Shape.expected(config(), 256, info.n_vocab), n_logits=n)) for n in (500, None))
    assert few.plan(info, "train") == training(info, few.config(info), replace(Shape.expected(few.config(info), 256, info.n_vocab), n_logits=500))
    assert few.plan(info, "train").peak.total_bytes < usual.plan(info, "train").peak.total_bytes


def test_what_is_loaded_already_is_not_asked_for_again(wide: Path) -> None:
    info = read_model_info(wide)
    shape = Shape.expected(config(), 256, info.n_vocab)
    plan = training(info, config(), shape)
    missing = plan.peak.total_bytes - sum(item.size_bytes for item in to_load(info, config(), shape))
    examples, vocabulary = (next(item for item in plan.peak.items if item.name.startswith(name)) for name in ("examples", "vocabulary"))
    assert missing == examples.size_bytes + vocabulary.size_bytes
    whole = training(info, config(engine={"trunk": False}), shape)
    missing = whole.peak.total_bytes - sum(item.size_bytes for item in to_load(info, config(engine={"trunk": False}), shape))
    loaded = [item for item in whole.peak.items if item.name.startswith(("examples", "weights", "vocabulary"))]
    assert missing == sum(item.size_bytes for item in loaded)


def test_the_peak_is_the_largest_phase_and_a_base_is_in_all_of_them() -> None:
    plan = Plan((Phase("a", (Item("x", 3),)), Phase("b", (Item("y", 2, mapped=True),)))).within(Item("base", 10))
    assert [phase.total_bytes for phase in plan.phases] == [13, 12]
    assert plan.peak.name == "a"
    assert plan.phases[1].mapped_bytes == 2


def test_a_setting_that_fits_is_left_alone_and_one_that_does_not_changes_as_little_as_it_must(wide: Path) -> None:
    info, asked = read_model_info(wide), Setting()
    peak = asked.plan(info, "train").peak.total_bytes
    assert cheapest(info, asked, "train", peak + 5, 5) == (asked, asked.plan(info, "train"))
    found = cheapest(info, asked, "train", peak + 4, 5)
    assert found is not None
    assert found[1].peak.total_bytes < peak
    assert found[0].kv_type == "f16"  # noise in the losses is dearer than time
    least = smallest(info, asked, "train")[1].peak.total_bytes
    assert cheapest(info, asked, "train", least, 0) is not None
    assert cheapest(info, asked, "train", least - 1, 0) is None


def test_a_change_is_said_as_the_option_of_the_command_that_takes_it(wide: Path) -> None:
    info, asked = read_model_info(wide), Setting()
    other = replace(asked, mmap=True, repack=False, kv_type="q8_0", batch=2, held_out=8, from_layer=2)
    assert other.options(asked, info, "eval") == ["--mmap", "--no-repack", "--kv-type q8_0", "--batch 2"]
    assert other.options(asked, info, "train") == [
        "--mmap", "--no-repack", "--kv-type q8_0", "--units 2 --fresh 2", "--held-out 8", "--from-layer 2",
    ]  # fmt: skip
    assert asked.options(asked, info, "train") == []
    with pytest.raises(UsageError, match=r"--from-layer is 9, but .*wide.gguf has layers 0 to 3"):
        replace(asked, from_layer=9).plan(info, "train")
    with pytest.raises(UsageError, match=r"KV cache type 'f8' is not one of f16"):
        Setting(kv_type="f8")


def test_processors_differ_in_what_they_rearrange() -> None:
    assert "Q8_0" in repacked_types("aarch64")
    assert "Q8_0" not in repacked_types("x86_64")
    assert {"Q4_0", "Q4_K"} <= set(repacked_types("arm64")) & set(repacked_types("AMD64"))
