"""Files damaged by hypothesis: ours never fails but by a `FileError`, and what passes never ends llama.cpp.

Half a second of it runs with the tests. FWDLLAMA_FUZZ_SECONDS=300 makes it longer; FWDLLAMA_FUZZ_SEED says where it begins. A file that ends
llama.cpp is kept, and its path is in the failure.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from gguf_tools.architecture import KEYS
from gguf_tools.errors import FileError
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.soundness import validate_file
from gguf_tools.synth import write_tiny_llama
from tests.gguf_tools import bases
from tests.gguf_tools.engine import Engine
from tests.gguf_tools.forge import ARRAY, BOOL, CODES, F32, F64, I32, STRING, U32, Parts, Tensor, scalar, size_of, strings

SECONDS = float(os.environ.get("FWDLLAMA_FUZZ_SECONDS", "0"))
FIRST_SEED = int(os.environ.get("FWDLLAMA_FUZZ_SEED", "1"))
N_EXAMPLES = 200 if SECONDS else 25
MODELS, ADAPTER = bases.models(), bases.adapter()
BITS = np.random.default_rng(0).bytes(1 << 20)

NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 31, 32, 63, 64, 65, 128, 255, 256, 299, 300, 301, 512, 513, 1 << 16, (1 << 31) - 1, 1 << 31,
                           (1 << 32) - 1])  # fmt: skip
FLOATS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-5, 1e-30, 3e38, -3e38, 0.5, 10_000.0, math.inf, -math.inf, math.nan])
TEXTS = st.sampled_from([b"", b"llama", b"gpt2", b"none", b"linear", b"yarn", b"longrope", b"default", b"llama-bpe", b"\xff", b"a\0b", b"phi3",
                         b"x" * 300, b"bert", b"qwen2", b"model", b"adapter", b"rwkv"])  # fmt: skip
ARCHITECTURE_KEYS = [*KEYS, "attention.sliding_window_pattern", "attention.key_length_swa", "rope.dimension_sections", "leading_dense_block_count",
                     "embedding_length_out", "classifier.output_labels", "attention.clamp_kqv", "logit_scale"]  # fmt: skip
OTHER_KEYS = [*(f"tokenizer.ggml.{name}" for name in (
    "model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id", "eot_token_id", "unknown_token_id",
    "padding_token_id", "seperator_token_id", "mask_token_id", "fim_pad_token_id", "add_bos_token", "add_eos_token", "add_sep_token",
    "add_space_prefix",
    "remove_extra_whitespaces", "token_type_count", "precompiled_charsmap", "suppress_tokens", "normalizer.lowercase")),
    "general.name", "general.file_type", "general.type", "general.alignment", "general.architecture", "split.count", "tokenizer.chat_template",
    "adapter.lora.alpha", "adapter.type", "adapter.alora.invocation_tokens", "fwdllama.base.sha256"]  # fmt: skip


@st.composite
def values(draw: st.DrawFn) -> tuple[int, bytes]:
    """A type and a payload."""
    kind = draw(st.sampled_from([U32, U32, U32, I32, F32, F32, F64, BOOL, STRING, 0, 2, 10, ARRAY]))
    if kind == ARRAY:
        of = draw(st.sampled_from([U32, I32, F32, BOOL, STRING]))
        n = draw(st.sampled_from([0, 1, 2, 300, 301]))
        if of == STRING:
            return ARRAY, strings([draw(TEXTS)] * n)
        value = draw(FLOATS) if of == F32 else draw(NUMBERS) & (1 if of == BOOL else (1 << 31) - 1)
        return ARRAY, struct.pack("<IQ", of, n) + struct.pack(f"<{CODES[of]}", value) * n
    if kind == STRING:
        return kind, scalar(kind, draw(TEXTS))
    if kind in (F32, F64):
        return kind, scalar(kind, draw(FLOATS))
    return kind, (draw(NUMBERS)).to_bytes(8, "little")[: struct.calcsize(CODES[kind])]


def edit_key(draw: st.DrawFn, parts: Parts) -> None:
    architecture = next((key.split(".")[0] for key in parts.keys if key.endswith(".block_count")), "llama")
    key = draw(st.sampled_from(ARCHITECTURE_KEYS).map(lambda name: f"{architecture}.{name}") | st.sampled_from([*parts.keys, *OTHER_KEYS]))
    kind, payload = draw(values())
    old = parts.keys.get(key)
    if old is not None and old[0] != ARRAY and draw(st.booleans()):  # another value of the same type: most likely to pass
        kind, size = old[0], len(old[1])
        value = draw(FLOATS) if kind == F32 else draw(NUMBERS)
        payload = scalar(kind, draw(TEXTS)) if kind == STRING else scalar(kind, value) if kind == F32 else int(value).to_bytes(8, "little")[:size]
    parts.keys[key] = kind, payload


def drop_key(draw: st.DrawFn, parts: Parts) -> None:
    del parts.keys[draw(st.sampled_from(list(parts.keys)))]


def edit_array(draw: st.DrawFn, parts: Parts) -> None:
    """Other bytes somewhere in an array, such as a token's text, or its length."""
    arrays = [key for key, (kind, _) in parts.keys.items() if kind == ARRAY]
    if arrays:
        key = draw(st.sampled_from(arrays))
        raw = bytearray(parts.keys[key][1])
        raw[draw(st.integers(min(12, len(raw) - 1), len(raw) - 1))] = draw(st.integers(0, 255))
        parts.keys[key] = ARRAY, bytes(raw)


def edit_tensor(draw: st.DrawFn, parts: Parts) -> None:
    """Another type, shape, name or content, the data as long as it must be."""
    i = draw(st.integers(0, len(parts.tensors) - 1))
    tensor = parts.tensors[i]
    what = draw(st.sampled_from(["type", "type", "shape", "name", "content"]))
    if what == "type":
        tensor = replace(tensor, type=int(draw(st.sampled_from(list(GGMLQuantizationType)))))
    elif what == "shape":
        ne = list(tensor.ne)
        ne[draw(st.integers(0, len(ne) - 1))] = draw(NUMBERS.filter(lambda n: n <= 512))
        tensor = replace(tensor, ne=tuple(draw(st.sampled_from([ne, ne[::-1], [*ne, 1], ne[:1]]))))
    elif what == "name":
        other = str(draw(st.sampled_from(parts.tensors)).name)
        names = [other.replace("blk.0", "blk.1"), other.replace("attn_q", "attn_qkv"), f"{other}.lora_a", other.replace("weight", "bias"),
                 "rope_freqs.weight", "output.weight", "token_embd.weight.lora_a", "blk.0.attn_q.scale", "../x.weight"]  # fmt: skip
        tensor = replace(tensor, name=draw(st.sampled_from(names)))
    n_bytes = size_of(tensor.ne, tensor.type)
    if what == "content" or len(tensor.payload) != n_bytes:
        start = draw(st.integers(0, 1 << 10))
        content = draw(st.sampled_from([b"\0", b"\xff", BITS[start:]]))
        tensor = replace(tensor, data=(content * (n_bytes // len(content) + 1))[:n_bytes])
    parts.tensors[i] = tensor


def drop_tensor(draw: st.DrawFn, parts: Parts) -> None:
    if len(parts.tensors) > 1:
        del parts.tensors[draw(st.integers(0, len(parts.tensors) - 1))]


def copy_tensor(draw: st.DrawFn, parts: Parts) -> None:
    tensor = draw(st.sampled_from(parts.tensors))
    name = str(tensor.name).replace("weight", draw(st.sampled_from(["bias", "scale", "weight"])))
    name = name.replace("blk.0", draw(st.sampled_from(["blk.0", "blk.1"])))
    ne = tensor.ne if draw(st.booleans()) else (tensor.ne[-1],)
    parts.tensors.append(Tensor(name, ne, tensor.type, None, bytes(size_of(ne, tensor.type))))


EDITS: list[Callable[[st.DrawFn, Parts], None]] = [
    *[edit_key] * 3, drop_key, *[edit_array] * 2, *[edit_tensor] * 2, drop_tensor, copy_tensor
]  # fmt: skip


class File:
    """A model or an adapter. No dataclass: hypothesis writes out all fields of those, and then warns of its length instead of failing."""

    def __init__(self, kind: str, data: bytes) -> None:
        self.kind, self.data = kind, data

    def __repr__(self) -> str:
        return f"File({self.kind!r}, n_bytes={len(self.data)})"


@st.composite
def files(draw: st.DrawFn) -> File:
    """A model or an adapter with one to three faults in its parts, and sometimes some in its bytes."""
    kind = draw(st.sampled_from(["model", "model", "adapter"]))
    parts = (draw(st.sampled_from(list(MODELS.values()))) if kind == "model" else ADAPTER).copy()
    for _ in range(draw(st.integers(1, 3))):
        draw(st.sampled_from(EDITS))(draw, parts)
    data = bytearray(parts.bytes())
    if draw(st.integers(0, 9)) == 0:
        n_header = len(data) - sum(len(tensor.payload) for tensor in parts.tensors)
        for _ in range(draw(st.integers(1, 3))):
            data[draw(st.integers(0, max(0, n_header - 1)))] = draw(st.integers(0, 255))
    return File(kind, bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 19)) == 0 else data))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    options = {**bases.SIZES, "n_layers": 3, "tied": False}
    return read_model_info(write_tiny_llama(tmp_path_factory.mktemp("fuzz") / "base.gguf", **options))


@pytest.fixture(scope="module")
def engine(base: ModelInfo) -> Iterator[Engine]:
    engine = Engine(base.path)
    yield engine
    engine.close()


def judged(kind: str, path: Path, base: ModelInfo) -> str:
    """What we say about a file; the sentence of one that is refused is checked."""
    try:
        verdict = validate_file(path, base=base if kind == "adapter" else None)
    except FileError as error:
        message = str(error)
    else:
        unknown = [what for what in verdict.unchecked if what.startswith(("the tokenizer", "the keys"))]
        return "passed but for what is not known" if unknown else "passed"
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return "refused by us"


def test_the_files_that_are_damaged_pass_and_load(base: ModelInfo, engine: Engine, tmp_path: Path) -> None:
    for name, parts in [*MODELS.items(), ("adapter", ADAPTER)]:
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(parts.bytes())
        kind = "adapter" if parts is ADAPTER else "model"
        validate_file(path, base=base if kind == "adapter" else None, data=True)
        assert engine.ask(kind, path) == "ok", name


def test_every_type_of_matrix_that_passes_loads_and_the_others_are_refused(base: ModelInfo, engine: Engine, tmp_path: Path) -> None:
    path, refused = tmp_path / "m.gguf", set()
    for kind in GGMLQuantizationType:
        parts = MODELS["llama of 256"].copy()
        for i, tensor in enumerate(parts.tensors):
            if str(tensor.name) in ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight"):
                n_bytes = size_of(tensor.ne, kind)
                parts.tensors[i] = replace(tensor, type=int(kind), data=(BITS * 2)[:n_bytes])
        path.write_bytes(parts.bytes())
        if judged("model", path, base) == "passed":
            assert engine.ask("model", path) == "ok", kind.name
        else:
            refused.add(kind.name)
    assert refused == {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}


def test_a_file_that_ends_llama_cpp_is_reported_with_its_signal(engine: Engine, tmp_path: Path) -> None:
    hostile = ADAPTER.copy()
    hostile.set("adapter.lora.alpha", U32, 16)
    (tmp_path / "integer.gguf").write_bytes(hostile.bytes())
    assert engine.ask("adapter", tmp_path / "integer.gguf") == "died of signal 6"
    (tmp_path / "good.gguf").write_bytes(ADAPTER.bytes())
    assert engine.ask("adapter", tmp_path / "good.gguf") == "ok"


def test_a_failure_says_what_was_kept_and_not_what_was_in_it() -> None:
    @settings(max_examples=1, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
    @given(files())
    def check(file: File) -> None:
        pytest.fail("kept.gguf passes")

    with pytest.raises(pytest.fail.Exception, match=r"^kept\.gguf passes\n") as caught:
        check()
    assert "b'GGUF" not in "".join(caught.value.__notes__)


def test_what_passes_never_crashes_llama_cpp(base: ModelInfo, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="fwdllama-fuzz-"))
    path = folder / "file.gguf"

    def check(file: File) -> None:
        path.write_bytes(file.data)
        said = judged(file.kind, path, base)
        answer = engine.ask(file.kind, path) if said == "passed" else "not asked"
        counts[f"{file.kind}: {said}, llama.cpp {answer}"] += 1
        if "died" in answer:
            kept = shutil.copy(path, folder / f"{answer.replace(' ', '-')}-{len(list(folder.iterdir()))}.gguf")
            pytest.fail(f"{kept} passes, but llama.cpp {answer}")
        if answer == "refused" and SECONDS:
            shutil.copy(path, folder / f"refused-{counts.total() % 20}.gguf")

    end, number = time.monotonic() + SECONDS, FIRST_SEED
    while number == FIRST_SEED or time.monotonic() < end:
        fuzz = settings(max_examples=N_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))(given(files())(check))
        seed(number)(fuzz)()
        number += 1
    with capsys.disabled():
        if SECONDS:
            print(f"\nseeds {FIRST_SEED} to {number - 1}: {dict(sorted(counts.items()))}; {folder}")  # noqa: T201
    if not SECONDS:
        shutil.rmtree(folder)
    assert any("passed, " in what for what in counts)
