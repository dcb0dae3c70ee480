"""What the aggregator sends as its page, and what a browser is told that the page may do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("fastapi", reason="the aggregator is in the extra `server`")

from fwdllama_server.dashboard import FOLDER, origin_of, policy, router

if TYPE_CHECKING:
    from .conftest import Aggregator

SCRIPTS = sorted(FOLDER.glob("*.js"))


def directives(text: str) -> dict[str, str]:
    return dict(part.strip().split(" ", 1) for part in text.split(";"))


def test_the_page_may_run_its_own_scripts_and_reach_its_own_server_only(aggregator: Aggregator) -> None:
    answer = aggregator.client.get("/")
    assert answer.status_code == 200
    allowed = directives(answer.headers["content-security-policy"])
    assert allowed["default-src"] == "'self'"
    assert allowed["connect-src"] == "'self'"
    assert allowed["require-trusted-types-for"] == "'script'"
    assert allowed["frame-ancestors"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_everything_that_the_page_names_is_served_with_its_type(aggregator: Aggregator) -> None:
    page = aggregator.client.get("/").text
    names = re.findall(r'(?:src|href)="(static/[^"]+)"', page)
    names += [f"static/{path.name}" for path in SCRIPTS]
    types = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for name in names:
        answer = aggregator.client.get(f"/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["content-type"].startswith(types[Path(name).suffix])
        assert "content-security-policy" in answer.headers


def test_scripts_import_only_what_is_there() -> None:
    for script in SCRIPTS:
        for name in re.findall(r'from "([^"]+)"', script.read_text()):
            assert name.startswith("./"), f"{script.name} imports {name}"
            assert (FOLDER / name).is_file(), f"{script.name} imports {name}"


def test_nothing_in_the_page_is_inline_or_from_elsewhere() -> None:
    page = (FOLDER / "page.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", page)
    for path in (*SCRIPTS, FOLDER / "page.html", FOLDER / "style.css"):
        text = re.sub(r"http://www\.w3\.org/2000/svg|http://127\.0\.0\.1:\d+", "", path.read_text())  # a name, and an example that is shown
        assert not re.search(r"https?://|//[a-z]+\.", text), path.name


def test_an_unchanged_file_is_answered_304_and_asked_for_each_time(aggregator: Aggregator) -> None:
    first = aggregator.client.get("/static/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = aggregator.client.get("/static/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    other = aggregator.client.get("/static/main.js", headers={"if-none-match": '"other"'})
    assert other.status_code == 200


@pytest.mark.parametrize("name", ["page.html", "__init__.py", "..%2fapp.py", "none.js"])
def test_only_the_files_of_the_page_are_served(aggregator: Aggregator, name: str) -> None:
    answer = aggregator.client.get(f"/static/{name}")
    assert answer.status_code == 404
    assert answer.json()["detail"]


def test_a_head_request_is_answered_like_a_get_without_its_body(aggregator: Aggregator) -> None:
    answer = aggregator.client.head("/")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["etag"]


def test_an_attached_model_server_may_be_reached_too() -> None:
    assert directives(policy("http://10.0.0.2:8081/v1"))["connect-src"] == "'self' http://10.0.0.2:8081"


@pytest.mark.parametrize("url", ["localhost:8081", "ftp://x", "http://a b", "http://x;script-src *", "javascript:alert(1)", "http://x,y", "http://"])
def test_a_model_server_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"is no URL; it should look like http://127\.0\.0\.1:8081"):
        origin_of(url)
    with pytest.raises(ValueError, match="is no URL"):
        router(url)
