"""A click through all pages in headless Chromium, as a team would do it, by mouse and by keys."""

from __future__ import annotations

import json
from pathlib import Path

from flows.serve.feedback import snapshot
from flows.ui.site import NAVIGATION
from tasks.registry.alias_log import moves
from tasks.registry.client import connect
from tests.flows.serve.registry import MODEL
from tests.flows.serve.serving import listening
from tests.flows.ui.team import Team
from tests.helpers.browser import Page, browsing


def chosen(page: Page) -> str:
    """The page that the navigation says one is on."""
    return str(page.evaluate("document.querySelector('nav [aria-current]')?.innerText"))


def test_a_team_clicks_through_all_pages(workspace: Path, pico_base: Path, tmp_path: Path) -> None:
    with (
        Team.at(workspace, tmp_path / "said.db", pico_base) as team,
        listening(team.app) as address,
        browsing(address) as page,
    ):
        page.open("/ui/login")
        page.type("#key", team.keys["approver"])
        page.click("main button")
        page.wait_for("What runs where")
        page.wait_for("Served here")
        numbered = list(enumerate((name for _, name in NAVIGATION), start=1))
        for number, name in [*numbered[1:], numbered[0]]:
            page.press(str(number))
            page.wait(f"document.querySelector('nav [aria-current]')?.innerText === {json.dumps(name)}")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name

        # two versions side by side: nine votes by a key, one by a click, and one that is skipped
        page.open("/ui/compare?first=1&second=2")
        page.wait_for("40 of 40 items are left to you")
        item = page.evaluate("document.querySelector('[name=item]').value")
        page.press("s")
        page.wait(f"document.querySelector('[name=item]').value !== {json.dumps(item)}")
        for left in range(39, 30, -1):
            page.press("lr"[left % 2])
            page.wait_for(f"{left} of 40 items are left to you")
        page.click("#question button")
        page.wait_for("30 of 40 items are left to you")
        assert "You preferred version" in page.text()

        # a chat with a model that answers twice
        for turn in (1, 2):
            page.open("/ui/chat")
            page.wait("document.querySelector('#prompt textarea')")
            page.type("#prompt textarea", f"Hello {turn}")
            page.click("#chat button:not([type=button])")
            page.wait("document.querySelectorAll('.two .answer').length === 2")
            page.press("r")
            page.wait_for("You preferred base.")
            assert page.evaluate("document.querySelectorAll('.turn').length") == 2

        # a row is edited and released
        page.open("/ui/quarantine")
        page.click('a[href="/ui/quarantine/row?id=s"]')
        page.wait_for("Why it may be learnt from")
        page.type("textarea:nth-of-type(1)", "uno")
        page.type('input[name="why"]', "looked up")
        page.click('button[value="release"]')
        page.wait_for("s is released into data/released/rows.")

        # a promotion needs its reason, is made, and is taken back
        page.open("/ui/promotions/2")
        page.wait_for("against champion")
        page.click('button[value="approve"]')
        assert page.evaluate("document.querySelector('input:invalid').name") == "reason"
        page.type('input[name="reason"]', "ten votes")
        page.click('button[value="approve"]')
        page.wait_for("Version 2 (qlora) is champion now.")
        page.type('input[name="reason"]', "too soon")
        page.click("form.panel button")
        page.wait_for("Version 1 (qlora) is champion again.")

        for width, dark in ((390, False), (390, True), (1200, True)):
            page.look(width, dark=dark)
            for place, _ in (*NAVIGATION, ("/promotions/2", "")):
                page.open(f"/ui{place}")
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (place, width)
            dim = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (dim == "rgb(18, 22, 28)") is dark

        page.click(".who button")
        page.wait_for("Your key")
    (_, promoted, back) = moves(connect(workspace), MODEL)
    assert (promoted.by, promoted.reason, back.reason) == ("anna", "ten votes", "too soon")
    assert json.loads((workspace / "data" / "released" / "rows" / "pair.jsonl").read_text())["input"] == "uno"
    found = snapshot(tmp_path / "said.db", tmp_path / "rows")
    assert found.counts() == {"preferences.jsonl": 2}
