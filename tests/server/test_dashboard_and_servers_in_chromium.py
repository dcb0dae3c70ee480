"""The page and the servers behind it: an aggregator that goes away and comes back, and a model server that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the aggregator is in the extra `server`")
pytest.importorskip("playwright", reason="needs playwright, which drives Chromium; it is in the extra `dev`")

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from playwright.sync_api import Browser
from starlette.responses import StreamingResponse

from .browser import ROUND, Site, browser, probe, served, site, site_in  # noqa: F401  (fixtures)

pytestmark = pytest.mark.browser


def test_after_a_restart_of_the_aggregator_the_page_catches_up_by_itself(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    with site_in(tmp_path / "aggregator", browser) as site:  # noqa: F811
        site.allowed = ("net::ERR_",)
        site.aggregator.create("toy", round=ROUND)
        member = site.aggregator.member()
        page = site.signed_in()
        page.wait_for_selector("#run-gate [aria-valuenow='0']")
        with site.interrupted():
            page.wait_for_selector("#link[data-state=waiting]")
        probe(member, n=2)
        page.wait_for_selector("#link[data-state=live]", timeout=20000)
        page.wait_for_selector("#round-table tbody tr th:text-is('0')")


def test_base_and_tuned_answers_stand_side_by_side_and_are_text(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    answering = FastAPI()

    @answering.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "base:other"}, {"id": "base"}, {"id": "base:toy"}]}

    @answering.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> StreamingResponse:
        said = [body["model"], " says ", "<b>", body["messages"][0]["content"], "</b>"]
        lines = [f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n" for piece in said]
        return StreamingResponse([*lines, "data: [DONE]\n\n"], media_type="text/event-stream")

    answering.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["GET", "POST"], allow_headers=["content-type"])
    with served(answering) as port, site_in(tmp_path / "aggregator", browser, model_server=f"http://127.0.0.1:{port}/v1") as site:  # noqa: F811
        site.allowed = (f"http://127.0.0.1:{port}/",)
        site.aggregator.create("toy")
        page = site.signed_in()
        page.wait_for_selector("#compare form:not([hidden])")
        assert page.input_value("#compare-tuned") == "base:toy"
        page.fill("#compare-prompt", "hello")
        page.click("text=Ask both")
        page.wait_for_selector("text=Both have answered.")
        assert page.locator(".said dd").all_inner_texts() == ["base says <b>hello</b>", "base:toy says <b>hello</b>"]


def test_without_a_model_server_the_page_says_how_to_attach_one(site: Site) -> None:  # noqa: F811
    site.aggregator.create("toy")
    page = site.signed_in()
    page.wait_for_selector("#compare-box :text('No model server is attached.')")
    assert "--model-server http://127.0.0.1:8081" in page.inner_text("#compare-box")
    assert not page.locator("#compare form").is_visible()
