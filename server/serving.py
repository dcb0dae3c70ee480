"""One process that serves the aggregator on a socket, until it is told to stop.

The first signal lets running requests finish, ends event streams and closes the database; Ctrl-C a second time does not wait for them.
"""

from __future__ import annotations

import gc
import platform
import signal
import socket
import ssl
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fwdllama.errors import UsageError

from . import journal
from .app import create_app
from .context import Context
from .graceful import GracefulServer
from .limits import Limits
from .listen import is_loopback, listening
from .opening import opened

SWITCH_S = 0.0005  # the event loop waits as long for the thread that writes, many times in every request
GRACE_S = 30  # for running requests, after which they are cut off


@dataclass(frozen=True)
class Setting:
    """How an aggregator is served. `proxies`: addresses whose X-Forwarded-For is believed, None for no proxy."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8470
    database: str | None = None
    tls: tuple[Path, Path] | None = None  # certificate chain, key
    proxies: str | None = None
    insecure: bool = False
    model_server: str | None = None
    public_metrics: bool = False
    limits: Limits = field(default_factory=Limits)
    log_format: journal.Format = "text"

    def url(self, port: int) -> str:
        """Where this machine reaches it."""
        host = self.host if self.host not in ("0.0.0.0", "::") else platform.node()
        return f"{'https' if self.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    def open(self, *, migrate: bool = False) -> Context:
        """The aggregator; `opened` says what is raised."""
        context = opened(
            self.folder, database=self.database, limits=self.limits, model_server=self.model_server, migrate=migrate
        )
        context.public_metrics = self.public_metrics
        return context


class Server(GracefulServer):
    """Ends event streams too when it is told to stop, since nobody else would."""

    def __init__(self, setting: Setting, context: Context) -> None:
        certificate, key = setting.tls or (None, None)
        super().__init__(create_app(context), drain_s=GRACE_S, cert=certificate, key=key)
        # Only where asked: whoever connects directly could claim any address, and rates are counted by it.
        self.config.proxy_headers = setting.proxies is not None
        self.config.forwarded_allow_ips = setting.proxies or ""
        self.context = context

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; at once, where Ctrl-C is pressed again. A worker is sent SIGTERM on top of the terminal's Ctrl-C, which must not count."""
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.context.stopping = self.should_exit = True


def bound(setting: Setting) -> socket.socket:
    """The socket to serve on.

    Raises:
        UsageError: the address is open to others without TLS and without having been told.
        ResourceError: it is in use, not of this machine, or not ours to take.
    """
    if not (setting.tls or setting.insecure or setting.proxies is not None or is_loopback(setting.host)):
        raise UsageError(
            f"--host {setting.host} can be reached by others, who could read keys on their way: give --tls-cert and --tls-key, "
            "--behind-proxy where a proxy does that, or --insecure."
        )
    return listening(setting.host, setting.port)  # before anything is made in the folder


def check_tls(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    """Both files of a certificate, found to belong together; None where neither is given.

    Raises:
        UsageError: one of them is missing, or they are unfit.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UsageError("--tls-cert and --tls-key belong together; give both.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        why = getattr(error, "reason", None) or error.strerror
        raise UsageError(f"--tls-cert {certificate} and --tls-key {key} cannot be used: {why}.") from error
    return certificate, key


def settle() -> None:
    """Set the interpreter up for serving: threads change places sooner, and what is loaded is not collected."""
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()


def serve(setting: Setting, context: Context, opened_socket: socket.socket) -> None:
    """Serve until a signal comes; closes the database."""
    settle()
    journal.set_up(setting.log_format, sys.stderr)
    try:
        Server(setting, context).serve_on(opened_socket)
    finally:
        context.store.close()
