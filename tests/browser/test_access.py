"""Who can use the console: with a key where one is needed, with any eyes, in any light."""

from __future__ import annotations

import asyncio
import importlib.resources

import pytest

from tests.browser.conftest import System
from tests.browser.page import PHONE, WIDE, Page
from tests.support.gateway_rig import running_gateway
from tests.support.tiers import representatives

AXE = importlib.resources.files("axe_core_python").joinpath("axe.min.js")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", representatives([WIDE, PHONE], {PHONE}), ids=["wide", "phone"])
def test_axe_finds_nothing(page: Page, system: System, theme: str, size: tuple[int, int]) -> None:
    """Names, roles, order of headings, and the contrast of every text with what is behind it."""
    page.theme(theme)
    page.resize(size)
    page.visit(system.url)
    page.wait(lambda: page.texts(".card.worker"))
    page.run(max_tokens=8)
    page.wait(lambda: page.all(".lane-row"))
    page.script("document.querySelector('details').open = true")
    page.script(AXE.read_text(encoding="utf-8"))
    found = page.driver.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'best-practice']})"
        ".then((r) => done({violations: r.violations, passes: r.passes.map((p) => p.id)}))"
    )
    told = [
        f"{violation['id']}: {node['html'][:120]} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
    assert told == []
    assert "color-contrast" in found["passes"]


CONTRAST = """
const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const luminance = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((v) => linear(v / 255))
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + .05) / (low + .05);
};
const panel = getComputedStyle(document.querySelector('.panel')).backgroundColor;
const found = {};
for (const [name, selector, least] of arguments[0]) {
  for (const element of document.querySelectorAll(selector)) {
    const is = contrast(getComputedStyle(element).fill, panel);
    if (is < least) found[name] = is;
  }
}
return found;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_drawings_can_be_told_from_their_ground(page: Page, system: System, theme: str) -> None:
    """What axe does not look at: texts of the chart, and the bars that carry its meaning."""
    page.theme(theme)
    page.visit(system.url)
    page.run(max_tokens=24)
    page.wait(lambda: page.all(".bar.step"))
    wanted = [
        ("labels", ".lane-name, .lane-note, .axis text, .first-token text", 4.5),
        ("bars", ".bar.prefill rect, .bar.kv rect, .bar.step rect:first-child", 3),
    ]
    assert page.script(CONTRAST, wanted) == {}


async def test_a_key_is_asked_for_and_kept_in_the_tab(page: Page) -> None:
    async with running_gateway(api_keys="open-sesame=acme") as edge:
        await asyncio.to_thread(_with_a_key, page, edge.url)


def _with_a_key(page: Page, url: str) -> None:
    page.visit(url, has_state=False)
    page.wait(lambda: page.one("#key").is_displayed())
    assert not page.texts(".card")
    page.fill("#key", "wrong")
    page.one("#key-form button").click()
    page.wait(lambda: "not known" in page.text("#key-problem"))
    page.fill("#key", "open-sesame")
    page.one("#key-form button").click()
    page.wait(lambda: page.texts(".card.worker"))
    assert not page.one("#key").is_displayed()
    page.run("Hello")
    assert page.text("#answer") == "Hello wörld!"
    page.driver.refresh()
    page.wait(lambda: page.texts(".card.worker"))
    assert page.script("return Object.keys(localStorage).length") == 0
    assert "open-sesame" not in page.driver.page_source


async def test_text_of_a_model_is_never_markup(page: Page) -> None:
    async with running_gateway() as edge:
        edge.fake.words = ("<img src=x onerror=alert(1)>", "<script>alert(2)</script>")
        await asyncio.to_thread(_with_markup, page, edge.url)


def _with_markup(page: Page, url: str) -> None:
    page.visit(url)
    page.run("x")
    assert page.text("#answer").startswith("<img src=x onerror=alert(1)>")
    assert not page.all("#answer *")
    assert page.console_errors() == []


async def test_pages_that_were_left_keep_no_connection(page: Page) -> None:
    """A browser has six connections per host; one that is left open would be missing here."""
    async with running_gateway() as edge:

        def visit_often() -> None:
            for _ in range(8):
                page.visit(edge.url)
            page.run("x")

        await asyncio.to_thread(visit_often)
