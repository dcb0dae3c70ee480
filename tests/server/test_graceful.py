"""Signals end a server as a user means them; that running requests finish is tested with a program that has some."""

from __future__ import annotations

import signal
import threading

import pytest
from fwdllama_server.graceful import GracefulServer
from fwdllama_server.listen import listening


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_the_second_ends_and_neither_is_a_failure(number: signal.Signals) -> None:
    server = GracefulServer(None, drain_s=1)
    before = signal.getsignal(number)
    with server.capture_signals():
        signal.raise_signal(number)
        assert (server.should_exit, server.force_exit) == (True, False)
        signal.raise_signal(number)
        assert (server.should_exit, server.force_exit) == (True, True)
    assert signal.getsignal(number) is before


def test_stop_ends_it_from_another_thread() -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        """Never asked."""

    server = GracefulServer(app, drain_s=1)
    with listening("127.0.0.1", 0) as opened:
        timer = threading.Timer(0.05, server.stop)
        timer.start()
        server.serve_on(opened)
    timer.join()
