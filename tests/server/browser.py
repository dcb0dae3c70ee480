"""A Chromium, an aggregator on a port, and pages that tell what went wrong in them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fwdllama_server.app import create_app
from fwdllama_server.limits import Limits
from fwdllama_server.opening import opened
from playwright.sync_api import Browser, Page, sync_playwright

from .conftest import Aggregator, Clock

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage")  # fmt: skip

ROUND = {"probes": 20, "most": 40, "probes_per_task": 10}


def chromium_path() -> str:
    """An installed Chromium: FWDLLAMA_CHROMIUM, or one on the path."""
    named = os.environ.get("FWDLLAMA_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium (apt install chromium), or its path in FWDLLAMA_CHROMIUM")
    return found


@contextlib.contextmanager
def served(app: Any, port: int = 0) -> Iterator[int]:
    """The application on a port of the loopback."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


class Now(Clock):
    """The time of day, so that the page's clock and the aggregator's agree."""

    def __call__(self) -> float:
        return time.time()


@dataclass
class Site:
    """An aggregator on a port, and a browser to look at it with."""

    aggregator: Aggregator
    serving: contextlib.ExitStack
    url: str
    browser: Browser
    problems: list[str] = field(default_factory=list)  # of the pages: errors on the console, requests to elsewhere
    allowed: tuple[str, ...] = ()  # what a test expects among the problems

    @property
    def key(self) -> str:
        """The administrator's."""
        return self.aggregator.context.secrets.admin

    def page(self, fragment: str = "", **options: Any) -> Page:
        """A page of a new browser context."""
        context = self.browser.new_context(reduced_motion="reduce", **options)
        context.set_default_timeout(8000)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self._look(request.url))
        page.goto(self.url + fragment)
        return page

    def signed_in(self, **options: Any) -> Page:
        """A page that has the key, and shows the first run."""
        page = self.page(f"#key={self.key}", **options)
        page.wait_for_selector("#app:not([hidden])")
        page.wait_for_selector("#link[data-state=live]")
        return page

    @contextlib.contextmanager
    def interrupted(self) -> Iterator[None]:
        """While the aggregator is down; afterwards it is back at the same address."""
        self.serving.close()
        yield
        self.aggregator.context.stopping = False
        self.serving.enter_context(served(create_app(self.aggregator.context), int(self.url.rstrip("/").rsplit(":", 1)[1])))

    def _look(self, url: str) -> None:
        if not url.startswith((self.url, f"blob:{self.url}", "data:", *self.allowed)):
            self.problems.append(f"request to {url}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests of a module."""
    path = chromium_path()
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        yield launched
        launched.close()


@contextlib.contextmanager
def site_in(folder: Path, browser: Browser, **options: Any) -> Iterator[Site]:
    """A new aggregator in a folder; at the end no page may have had a problem that was not expected."""
    context = opened(folder, limits=Limits(newcomers_per_s=1000.0, requests_per_s=1000.0), **options)
    clock = context.now = Now()
    with contextlib.ExitStack() as serving:
        url = f"http://127.0.0.1:{serving.enter_context(served(create_app(context)))}/"
        client = httpx.Client(base_url=url)
        site = Site(Aggregator(context, client, clock), serving, url, browser)  # type: ignore[arg-type]
        try:
            yield site
        finally:
            client.close()
            for opened_context in browser.contexts:
                opened_context.close()
    context.store.close()
    assert [problem for problem in site.problems if not any(part in problem for part in site.allowed)] == []


@pytest.fixture
def site(tmp_path: Path, browser: Browser) -> Iterator[Site]:
    """An aggregator of the test's own."""
    with site_in(tmp_path / "aggregator", browser) as found:
        yield found


def probe(member: Any, run: str = "toy", n: int = 1) -> None:
    """Deliver the probes of n tasks; of what else there is to do, too."""
    while n:
        given = member.work(run)
        n -= bool(given["task"] and given["task"]["kind"] == "train")
