"""The page as a reader meets it, in a real browser, over a real aggregator whose rounds real devices of the toy close."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the aggregator is in the extra `server`")
pytest.importorskip("playwright", reason="needs playwright, which drives Chromium; it is in the extra `dev`")

from .browser import ROUND, Site, browser, probe, site  # noqa: F401  (fixtures)

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=document.title='owned'>"


def visible(page: Any, selector: str) -> bool:
    return page.locator(selector).is_visible()


def test_without_a_key_there_is_a_login_box_and_nothing_else(site: Site) -> None:  # noqa: F811
    site.aggregator.create("secret-run")
    page = site.page()
    page.wait_for_selector("#login:not([hidden])")
    assert not visible(page, "#app")
    assert "secret-run" not in page.content()
    assert page.evaluate("document.activeElement.id") == "key"


def test_a_wrong_key_is_refused_with_one_sentence_and_the_right_one_signs_in(site: Site) -> None:  # noqa: F811
    site.allowed = ("401 (Unauthorized)",)
    site.aggregator.create("toy")
    page = site.page("#key=wrong")
    page.wait_for_selector("#login:not([hidden])")
    assert page.inner_text("#login-problem") == "This is not the admin key of this aggregator."
    assert not visible(page, "#app")
    page.fill("#key", site.key)
    page.keyboard.press("Enter")
    page.wait_for_selector("#run-title:text('toy')")
    assert not visible(page, "#login")


def test_a_key_in_the_address_is_removed_from_it_and_forgotten_at_sign_out(site: Site) -> None:  # noqa: F811
    site.aggregator.create("toy")
    page = site.signed_in()
    page.wait_for_selector("#run-title:text('toy')")
    assert site.key not in page.url
    assert page.evaluate("history.length") <= 2
    assert page.evaluate("Object.values(localStorage).length") == 0
    page.reload()  # the session holds it
    page.wait_for_selector("#run-title:text('toy')")
    page.click("#leave")
    page.wait_for_selector("#login:not([hidden])")
    assert page.evaluate("Object.values(sessionStorage).join()") == ""
    assert "toy" not in page.inner_text("body")


def test_the_page_follows_a_round_to_its_close_without_being_loaded_again(site: Site) -> None:  # noqa: F811
    site.aggregator.create("toy", round=ROUND, rounds=8)
    member = site.aggregator.member("phone")
    page = site.signed_in()
    page.evaluate("window.sameDocument = true")
    page.wait_for_selector("#run-gate [aria-valuenow='0']")
    probe(member)
    page.wait_for_selector("#run-gate [aria-valuenow='10']")  # 10 of 20 probes, by an event
    assert "10 of 20 probes" in page.inner_text(".gate-state")
    probe(member)
    page.wait_for_selector("#round-table tbody tr th:text-is('0')")
    page.wait_for_selector("#news:text('Round 0 closed: 20 probes of 1 device, loss 8.0000.')")
    page.wait_for_selector("#version-table tbody tr:first-child:has-text('latest') th:has-text('1')")
    page.wait_for_selector("#device-table tr:has-text('phone') :text-is('20')")  # its probes
    assert page.evaluate("window.sameDocument")


def test_a_downloaded_adapter_is_byte_for_byte_that_of_the_api(site: Site, tmp_path: Path) -> None:  # noqa: F811
    site.aggregator.create("toy", round=ROUND)
    member = site.aggregator.member()
    probe(member, n=2)
    page = site.signed_in()
    with page.expect_download() as started:
        page.click("button[aria-label='Download adapter of version 1']")
    assert started.value.suggested_filename == "toy-v1.gguf"
    started.value.save_as(tmp_path / "saved.gguf")
    expected = site.aggregator.admin("GET", "/v1/runs/toy/versions/1/adapter.gguf")
    assert (tmp_path / "saved.gguf").read_bytes() == expected.content
    digest = expected.headers["etag"].strip('"')[:12]
    page.wait_for_selector(f"#news:text('Saved toy-v1.gguf:'):text('{digest}… checked')")
    page.wait_for_selector(f"#version-table code:text('file {digest}')")
    assert "any program that loads a LoRA adapter" in page.inner_text("#scope-note")


def test_a_device_revoked_on_the_page_is_refused_at_once(site: Site) -> None:  # noqa: F811
    site.aggregator.create("toy", round=ROUND)
    member = site.aggregator.member("kitchen phone")
    page = site.signed_in()
    page.click("button[aria-label='Revoke kitchen phone']")
    page.click("#confirm-no")
    assert member.send("GET", "/v1/runs").status_code == 200
    page.click("button[aria-label='Revoke kitchen phone']")
    page.click("#confirm-yes")
    page.wait_for_selector("#device-table tr.revoked")
    assert member.send("GET", "/v1/runs").status_code == 401


def test_markup_in_a_device_name_stays_text(site: Site) -> None:  # noqa: F811
    site.aggregator.create("toy")
    site.aggregator.member(HOSTILE)
    page = site.signed_in()
    page.wait_for_selector("#device-table tbody tr")
    assert page.inner_text("#device-table tbody th") == HOSTILE
    assert page.locator("img").count() == 0
    page.click("#device-table tbody button")  # its name is in the question, too
    assert HOSTILE in page.inner_text("#confirm-text")
    assert page.title() == "fwdllama aggregator"


def test_a_run_is_paused_resumed_rolled_back_and_finished_from_the_page(site: Site) -> None:  # noqa: F811
    site.aggregator.create("toy", round=ROUND)
    member = site.aggregator.member()
    probe(member, n=4)

    def run() -> dict[str, Any]:
        return site.aggregator.admin("GET", "/v1/runs/toy").json()

    page = site.signed_in()
    page.click("#run-controls >> text=Pause")
    page.wait_for_selector("#run-controls >> text=Resume")
    assert run()["status"] == "paused"
    page.click("#run-controls >> text=Resume")
    page.wait_for_selector("#run-controls >> text=Pause")
    page.click("button[aria-label='Roll back to version 1']")
    page.click("#confirm-yes")
    page.wait_for_selector("#happened :text('rolled back to version 1; this is version 3')")
    versions = site.aggregator.admin("GET", "/v1/runs/toy/versions").json()
    assert versions[3]["theta_digest"] == versions[1]["theta_digest"]
    page.wait_for_selector("#round-table td:text('back to version 1')")
    page.click("#run-controls >> text=Finish")
    page.click("#confirm-yes")
    page.wait_for_selector("#run-controls .pill.finished")
    assert run()["status"] == "finished"
    assert page.locator("#run-controls button").count() == 0


def test_a_token_made_on_the_page_enrols_a_device_and_is_shown_once(site: Site) -> None:  # noqa: F811
    page = site.signed_in()
    page.fill("#token-name", "home")
    page.click("#token-form button")
    command = page.inner_text("#join-command")
    assert command.startswith(f"fwdllama join {site.url.rstrip('/')} --token ")
    assert "replace it by an address that it can reach" in page.inner_text(".made")  # this one is of the loopback
    site.aggregator.enrolment = command.split("--token ")[1].split(" ")[0]
    assert site.aggregator.member("new one").send("GET", "/v1/runs").status_code == 200
    page.wait_for_selector("#device-table th:text('new one')")
    page.reload()
    page.wait_for_selector("#token-box")
    assert site.aggregator.enrolment not in page.content()


def test_ten_thousand_devices_are_paged_and_a_thousand_rounds_thinned(site: Site) -> None:  # noqa: F811
    from fwdllama_server.schema import devices, entries, tokens

    run = site.aggregator.create("toy")["run"]
    now = time.time()
    rounds = []
    for i in range(1000):
        loss = 9.0 if i == 777 else 2.0 + 0.1 * (i % 7)
        facts = {"run": "toy", "round": i, "n_probes": 20, "n_wanted": 20, "n_devices": 1, "loss": loss}
        stored = {"payload": b"", "hash": b"", "theta_digest": "", "closed_at": now, "facts": json.dumps(facts)}
        rounds.append({"run": run, "number": i, **stored})
    many = [{"id": f"d{i:05}", "name": f"phone {i}", "token": "k", "enrolled_at": now, "last_seen": now} for i in range(10_000)]

    def fill(connection: Any) -> None:
        connection.execute(tokens.insert().values(id="k", hash="k", name="k", created_at=now))
        connection.execute(devices.insert(), many)
        connection.execute(entries.insert(), rounds)

    site.aggregator.context.store.submit(fill).result()
    page = site.signed_in()
    page.wait_for_selector("#run-charts polyline")
    points = [pair.split(",") for pair in page.locator("#run-charts polyline").first.get_attribute("points").split(" ")]
    assert 100 < len(points) <= 320
    highest = min(float(y) for _, y in points)
    assert sum(float(y) == highest for _, y in points) == 1  # the one peak is not thinned away
    page.click("#run-charts figure:first-child summary")
    page.wait_for_selector("#run-charts figure:first-child tbody tr:nth-child(1000)", state="attached")  # filled after it opened
    assert page.locator("#run-charts figure:first-child tbody tr").count() == 1000
    assert page.locator("#device-table tbody tr").count() == 25
    page.click(".pager >> text=Next")
    page.wait_for_selector(".where:text('Devices 26 to 50')")
    assert page.inner_text("#device-table tbody tr:first-child th") == "phone 25"
    page.click(".pager >> text=Previous")
    page.wait_for_selector(".where:text('Devices 1 to 25')")
    assert page.locator(".pager >> text=Previous").is_disabled()


NAMELESS = """() => [...document.querySelectorAll("input, select, textarea, button, a, svg[role=img], [role=region], [role=progressbar], table")]
  .filter((node) => node.checkVisibility())
  .filter((node) => {
    const referred = (node.getAttribute("aria-labelledby") ?? "").split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join("");
    const own = /^(BUTTON|A)$/.test(node.tagName) ? node.textContent : (node.querySelector(":scope > caption")?.textContent ?? "");
    return !(node.getAttribute("aria-label") || referred || node.labels?.length || own.trim());
  }).map((node) => node.outerHTML.slice(0, 120))"""


TOO_WIDE = """() => [...document.querySelectorAll("body *")]
  .filter((node) => node.getBoundingClientRect().right > innerWidth + 1 && !node.closest(".scroll, .unseen"))
  .map((node) => node.outerHTML.slice(0, 120))"""


def test_everything_that_can_be_used_has_a_name_and_fits_a_phone(site: Site) -> None:  # noqa: F811
    site.aggregator.create("toy-with-a-name-as-long-as-a-name-of-a-run-may-be-which-is-64-ch", round=ROUND)
    member = site.aggregator.member("W" * 64)
    name = "toy-with-a-name-as-long-as-a-name-of-a-run-may-be-which-is-64-ch"
    probe(member, name, 4)
    page = site.signed_in(viewport={"width": 360, "height": 740})
    page.wait_for_selector("#run-charts polyline")
    page.fill("#token-name", "x" * 64)
    page.click("#token-form button")
    page.wait_for_selector("#join-command")
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate("[...document.querySelectorAll('thead th')].every((head) => head.scope === 'col')")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('#app :is(h1,h2,h3,h4)')].map((node) => node.tagName)")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.get_attribute("html", "lang") == "en"


def test_the_page_can_be_used_by_keyboard_and_shows_where_it_is(site: Site) -> None:  # noqa: F811
    site.aggregator.create("toy", round=ROUND)
    page = site.signed_in()
    page.wait_for_selector("#run-controls button")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        tag, text, outline = page.evaluate(
            "(({ tagName, textContent }, style) => [tagName, textContent.trim(), style.outlineStyle])"
            "(document.activeElement, getComputedStyle(document.activeElement))"
        )
        if tag == "BODY":  # once around
            break
        reached.add(text)
        assert outline != "none", (tag, text[:80])
    assert {"Sign out", "toy", "Pause", "Finish", "Settings of the run", "Make a token"} <= reached
