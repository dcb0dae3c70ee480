"""Several processes that serve one aggregator: started, watched, replaced when one dies, and stopped together.

They share the socket and the database and nothing else; no worker holds anything of a round that another could not read.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType

from . import journal
from .metrics import SHARED
from .serving import GRACE_S, Server, Setting, settle

log = logging.getLogger("fwdllama.server")
SHORT_S = 5.0  # a worker that lives no longer has not worked
MOST_SHORT = 5  # so many in a row, and there is no point in trying on


def supervise(setting: Setting, listening: socket.socket, n_workers: int) -> int:
    """Run workers until a signal comes; returns the exit code."""
    journal.set_up(setting.log_format, sys.stderr)
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    shared = tempfile.mkdtemp(prefix="fwdllama-metrics-")
    os.environ[SHARED] = shared  # of the workers; this process imported the library before
    try:
        return _watch(setting, listening, n_workers, pressed)
    finally:
        del os.environ[SHARED]
        shutil.rmtree(shared, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(setting: Setting, listening: socket.socket, n_workers: int, pressed: list[int]) -> int:
    running = {}
    n_short = 0

    def start() -> None:
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(setting, listening))
        process.start()
        running[process] = time.monotonic()

    for _ in range(n_workers):
        start()
    while not pressed and n_short < MOST_SHORT:
        wait([process.sentinel for process in running], timeout=0.2)  # short, because a signal does not end it
        for process in [process for process in running if not process.is_alive()]:
            n_short = n_short + 1 if time.monotonic() - running.pop(process) < SHORT_S else 0
            if not pressed and n_short < MOST_SHORT:
                log.error("a worker ended; another takes its place", extra={"facts": {"pid": process.pid, "exit_code": process.exitcode}})
                start()
    if n_short >= MOST_SHORT:
        log.error("workers end as soon as they start; giving up")
    _stop(list(running), pressed)
    return 1 if n_short >= MOST_SHORT else 0


def _stop(processes: list[SpawnProcess], pressed: list[int]) -> None:
    """Ask them to finish; at a second Ctrl-C, or when the time is up, end them."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + GRACE_S + 5.0
    n_before = len(pressed)
    while any(process.is_alive() for process in processes):
        if signal.SIGINT in pressed[n_before:] or time.monotonic() > until:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    for process in processes:
        process.join()


def _work(setting: Setting, listening: socket.socket) -> None:
    """One worker, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C reaches all; the supervisor decides what it means
    journal.set_up(setting.log_format, sys.stderr)
    context = setting.open()
    serving = Server(setting, context)
    threading.Thread(target=_follow, args=(serving,), daemon=True).start()
    try:
        settle()
        serving.serve_on(listening)
    finally:
        context.store.close()


def _follow(serving: Server) -> None:
    """Stop when the supervisor is gone, even if it was killed: nobody would stop this worker, and the port would stay taken."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    serving.handle_exit(signal.SIGTERM, None)
