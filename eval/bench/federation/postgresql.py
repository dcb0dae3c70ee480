"""A PostgreSQL of its own in a folder, from the system's binaries; it refuses to run as root, so root lends it to `nobody`."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from ..measure import BenchError
from .aggregator import HOST, free_port

PLACES = "usr/lib/postgresql/*/bin/initdb"  # Debian's, not on the path


def binaries() -> Path | None:
    """Where the programs are; None where there are none."""
    found = shutil.which("initdb")
    places = [Path(found)] if found else sorted(Path("/").glob(PLACES))
    return places[-1].parent if places else None


class PostgreSQL:
    """A new cluster, started; stopped and removed at the end of the block."""

    def __init__(self) -> None:
        programs = binaries()
        if programs is None:
            raise BenchError("there is no PostgreSQL here (initdb was not found).")
        self.programs, self.port = programs, free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="fwdllama-postgresql-"))
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self._user: dict[str, int] = {"user": nobody.pw_uid, "group": nobody.pw_gid}
        else:
            self._user = {}

    @property
    def url(self) -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg://bench@{HOST}:{self.port}/postgres"

    def __enter__(self) -> PostgreSQL:
        data = str(self.folder / "data")
        self._run("initdb", "-D", data, "-U", "bench", "-A", "trust", "-E", "UTF8", "--locale=C")
        options = f"-c listen_addresses={HOST} -p {self.port} -k {self.folder}"
        self._run("pg_ctl", "-D", data, "-w", "-l", str(self.folder / "log"), "-o", options, "start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "immediate", "stop")
        shutil.rmtree(self.folder)

    def _run(self, program: str, *words: str) -> None:
        command = [str(self.programs / program), *words]
        done = subprocess.run(
            command, cwd="/", check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **self._user  # type: ignore[call-overload]
        )
        if done.returncode:
            raise BenchError(f"{program} failed: {done.stderr.decode(errors='replace').strip()}")
