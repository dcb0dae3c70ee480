"""An aggregator's folder as one file, taken while it is served, and a folder made of one.

The file is a tar archive: the database as of one moment, what it is (manifest.json), and with them, if asked, the two secrets. Without
those a copy of the database lets nobody in, and no device of the old folder into the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from fwdllama.errors import ResourceError, UsageError
from gguf_tools.output import new_file

from .opening import DATABASE

SECRETS = ("device.secret", "admin.key")
MANIFEST = "manifest.json"
KIND = "fwdllama aggregator"


def back_up(folder: Path, out: Path, *, with_secrets: bool, force: bool = False) -> dict[str, Any]:
    """Write a backup, mode 0600; returns its manifest. The aggregator may be running.

    Raises:
        ResourceError: there is no database in the folder, or it cannot be read.
        FileError: `out` exists and `force` is not given, or cannot be written.
    """
    source = folder / DATABASE
    if not source.is_file():
        raise ResourceError(f"{source} does not exist; only SQLite is backed up here (for PostgreSQL use pg_dump).")
    with new_file(out, force=force) as temporary, tempfile.TemporaryDirectory(dir=out.parent, prefix=".fwdllama-") as workshop:
        copy = Path(workshop) / DATABASE
        try:
            with closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=rw", uri=True)) as connection:
                connection.execute("VACUUM INTO ?", (str(copy),))  # one read transaction: writers neither wait nor are seen half
        except sqlite3.Error as error:
            raise ResourceError(f"{source}: cannot be copied: {error}.") from error
        manifest = {"kind": KIND, "made_at": time.time(), "sha256": _sha256(copy), "secrets": with_secrets}
        with _private(temporary) as file, tarfile.open(fileobj=file, mode="w") as archive:
            _add(archive, MANIFEST, json.dumps(manifest).encode())
            for name in SECRETS if with_secrets else ():
                _add(archive, name, (folder / name).read_bytes())
            archive.add(copy, DATABASE, filter=_anonymous)
    return manifest


def restore(file: Path, folder: Path) -> dict[str, Any]:
    """Make a folder of a backup; returns its manifest. Secrets that are in the folder stay, if the backup has none or the same.

    Raises:
        ResourceError: it is no backup, damaged, or the folder has a database already or other secrets.
    """
    target = folder / DATABASE
    if target.exists():
        raise ResourceError(f"{target} exists already; restore into a new folder.")
    with _opened(file) as archive:
        manifest = json.loads(_read(archive, MANIFEST, file))
        if manifest.get("kind") != KIND:
            raise ResourceError(f"{file} is no backup of an aggregator.")
        kept = {name: _read(archive, name, file) for name in SECRETS} if manifest["secrets"] else {}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, data in kept.items():
            if (folder / name).exists() and (folder / name).read_bytes() != data:
                raise ResourceError(f"{folder / name} is not the one in {file}; restore into a new folder.")
        with new_file(target) as temporary:
            source = archive.extractfile(DATABASE)
            assert source is not None
            with temporary.open("xb") as copy:
                while block := source.read(1 << 20):
                    copy.write(block)
            if _sha256(temporary) != manifest["sha256"]:
                raise ResourceError(f"{file} is damaged: its database is not what was backed up.")
            for name, data in kept.items():
                if not (folder / name).exists():
                    with new_file(folder / name) as secret, _private(secret) as written:
                        written.write(data)
    return dict(manifest)


def _private(path: Path) -> BinaryIO:
    """A new file that only its owner can read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o600
    archive.addfile(member, io.BytesIO(data))


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(file, "r:") as archive:
            yield archive
    except tarfile.TarError as error:
        raise ResourceError(f"{file} is no backup of an aggregator, or damaged ({error}).") from error
    except FileNotFoundError as error:
        raise UsageError(f"{file} does not exist.") from error


def _read(archive: tarfile.TarFile, name: str, file: Path) -> bytes:
    """A member's content; only names that are known are ever asked for, so nothing can be put outside the folder."""
    try:
        found = archive.extractfile(name)
    except KeyError:
        found = None
    if found is None:
        raise ResourceError(f"{file} is no backup of an aggregator: it lacks {name}.")
    return found.read(1 << 20)
