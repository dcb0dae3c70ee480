"""Everything a user can get wrong: one sentence that names it, the right exit code, and nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import filelock
import pytest

from gguf_tools.adapter import read_adapter, write_adapter
from gguf_tools.synth import write_tiny_llama
from tests.questions import squad

from .conftest import Run


def nothing_written(folder: Path) -> bool:
    return not (folder / "adapter.gguf").exists() and not (folder / "adapter-run" / "run.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--model", "absent.gguf"], 1, "absent.gguf: no such file. A model is smollm2-135m"),
        (["--model", "smollm2-135m"], 1, "fetch it with: fwdllama model fetch smollm2-135m"),
        (["--model", "smollm2-135m:int3"], 2, "smollm2-135m has no variant 'int3'; choose int8 or fp16 or int4."),
        (["--model", "."], 1, ". is a folder; give the path of a GGUF file."),
        (["--modules", "q,z"], 2, "--modules: module 'z' cannot be trained; choose from q, k, v, o, gate, up, down"),
        (["--modules", "token_embd"], 2, "with tied embeddings it is the output matrix too"),
        (["--layers", "1-9"], 2, "layers 1-9 are outside the model, which has layers 0-2."),
        (["--layers", "2-1"], 2, "layers 2-1 are outside the model"),
        (["--rank", "0"], 2, "--rank: Input should be greater than or equal to 1 (got 0)."),
        (["--rank", "999"], 2, "rank 999 exceeds the smaller side of blk.1.attn_q.weight (64 x 64)."),
        (["--rank", "four"], 2, "Invalid value for '--rank'"),
        (["--data", "absent.json"], 1, "absent.json: no such file."),
        (["--labels", "a=b"], 2, "label words and columns are for classification, but this is squad data."),
        (["--labels", "a"], 2, "--labels is 'a', but must give each class once"),
        (["--eval-data", "absent.json"], 1, "absent.json: no such file."),
        (["--eval-limit", "0"], 2, "Invalid value for '--eval-limit'"),
        (["--ctx", "8"], 1, "none of its examples fits the context of 8 tokens. Use a larger --ctx."),
        (["--eps", "1e-12"], 1, "eps 1e-12 is below the noise floor"),
        (["--report", "."], 1, ".: is a folder, but a file to write was expected."),
        (["--out", "."], 1, ".: is a folder, but a file to write was expected."),
        (["--out", "train.json/a.gguf"], 1, "train.json cannot be written: train.json is not a writable folder."),
        (["--run", "train.json/run"], 1, "is not a writable folder."),
        (["--kind", "classification"], 1, "train.json: "),
    ],
)
def test_options_that_cannot_work(train: Run, tmp_path: Path, arguments: list[str], code: int, sentence: str) -> None:
    result = train(*arguments)
    assert result.code == code
    assert sentence in result.error
    assert result.out == ""
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "d.json: the file is empty."),
        (b'{"data": [', "d.json: not JSON at line 1, column 11"),
        (b'{"data": []}', "d.json: there are no examples in it."),
        (b"{\"data\": \"\xff\"}", "d.json: not UTF-8 text"),
        (b"\x1f\x8b\x08\x00", "d.json: the gzip data is damaged or cut short"),
        (b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": []}]}]}]}',
         "d.json: none of its examples can be used: 1 without an answer."),
        (json.dumps(squad(1)).encode(), "d.json: nothing can be held out of a single paragraph"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used(train: Run, tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "d.json").write_bytes(content)
    result = train("--data", "d.json")
    assert result.code == 1
    assert sentence in result.error
    assert nothing_written(tmp_path)


def test_answers_that_leave_no_room_are_left_out_and_all_of_them_is_an_error(train: Run, data: Path) -> None:
    held = squad(12)
    for paragraph in held["data"][0]["paragraphs"]:
        for question in paragraph["qas"]:
            question["answers"][0]["text"] = "abc " * 100
    data.write_text(json.dumps(held))
    result = train("--ctx", 128)
    assert result.code == 1
    assert "none of its examples fits the context of 128 tokens. Use a larger --ctx." in result.error


def test_files_that_are_no_whole_model(train: Run, model: Path, data: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(model.read_bytes()[:-4000])
    result = train("--model", truncated)
    assert result.code == 1
    assert "truncated.gguf: " in result.error
    assert "truncated" in result.error.replace("truncated.gguf", "")
    result = train("--model", data)
    assert result.code == 1
    assert "train.json: is not a GGUF file; it begins with" in result.error
    other = write_tiny_llama(tmp_path / "other.gguf", architecture="nonsense")
    result = train("--model", other)
    assert result.code == 1
    assert "other.gguf: " in result.error
    assert "'nonsense'" in result.error


def test_an_adapter_is_no_model(train: Run, adapter: Path) -> None:
    result = train("--model", adapter, "--run", "other")
    assert result.code == 1
    assert result.error == f"{adapter}: is an adapter, but a base model was expected."


def test_a_folder_without_permission_is_refused(train: Run, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    result = train("--out", closed / "a.gguf")
    assert result.code == 1
    assert "is not a writable folder" in result.error


def test_a_run_directory_is_not_started_twice(train: Run, adapter: Path) -> None:
    before = (adapter.parent / "adapter-run" / "ledger.bin").read_bytes()
    result = train()
    assert result.code == 1
    assert "adapter-run is not empty" in result.error
    assert "continue it with `fwdllama resume adapter-run`" in result.error
    assert (adapter.parent / "adapter-run" / "ledger.bin").read_bytes() == before


def test_a_run_takes_one_process(run: Run, adapter: Path) -> None:
    with filelock.FileLock(adapter.parent / "adapter-run" / ".lock"):
        for more in ((), ("--steps", "1")):
            result = run("resume", "adapter-run", *more)
            assert result.code == 1
            assert result.error == "adapter-run is in use by another process; one run takes one process."


def test_what_is_no_run_cannot_be_resumed(run: Run, tmp_path: Path) -> None:
    for name in ("absent", "."):
        result = run("resume", name)
        assert result.code == 1
        assert result.error.startswith(f"{name} is not a run directory: it has no run.json.")


def test_a_run_goes_on_with_its_own_model_data_and_configuration_only(
    run: Run, train: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.gguf"
    shutil.copy(model, own)
    assert train("--model", own).code == 0
    folder = tmp_path / "adapter-run"
    config, text = folder / "config.json", data.read_text()
    kept = config.read_text()
    config.write_text(kept.replace('"example_clip": 2', '"example_clip": 3'))
    assert config.read_text() != kept
    result = run("resume", "adapter-run", "--steps", 1)
    assert (result.code, "adapter-run belongs to another configuration" in result.error) == (1, True)
    config.write_text(kept)
    data.write_text(json.dumps(squad(12, seed=9)))
    result = run("resume", "adapter-run", "--steps", 1)
    assert (result.code, "adapter-run belongs to another data" in result.error) == (1, True)
    data.write_text(text)
    write_tiny_llama(own, type="Q8_0", seed=5)
    result = run("resume", "adapter-run", "--steps", 1)
    assert (result.code, "adapter-run belongs to another base model" in result.error) == (1, True)
    shutil.copy(model, own)
    initial = folder / "initial.gguf"
    begun = initial.read_bytes()
    write_adapter(initial, replace(read_adapter(initial), invocation_tokens=(61, 13)))
    result = run("resume", "adapter-run", "--steps", 1)
    sentence = r"adapter-run belongs to another form of questions, of an answer behind the tokens: it was \(61, 13\), and is \(\d+, .*\) now\."
    assert result.code == 1
    assert re.search(sentence, result.error)
    initial.write_bytes(begun)
    assert run("resume", "adapter-run", "--steps", 1).code == 0


def test_a_damaged_run_says_what_is_damaged(run: Run, adapter: Path) -> None:
    state = adapter.parent / "adapter-run" / "state.json"
    state.write_text("{")
    result = run("resume", "adapter-run")
    assert result.code == 1
    assert "state.json is damaged" in result.error


def test_an_adapter_of_another_model_is_refused(run: Run, adapter: Path, model: Path, tmp_path: Path) -> None:
    wide = write_tiny_llama(tmp_path / "wide.gguf", n_embd=128)
    result = run("answer", "--model", wide, "--adapter", adapter, "--prompt", "hi")
    assert result.code == 1
    assert "has shape" in result.error
    alike = write_tiny_llama(tmp_path / "alike.gguf", type="Q8_0", seed=3)
    result = run("answer", "--model", alike, "--adapter", adapter, "--prompt", "hi")
    assert result.code == 1
    assert "was trained on the base model with SHA-256" in result.error
    result = run("answer", "--model", model, "--adapter", model, "--prompt", "hi")
    assert result.code == 1
    result = run("answer", "--model", model, "--adapter", "absent.gguf", "--prompt", "hi")
    assert result.code == 1
    assert result.error == "absent.gguf: does not exist."
