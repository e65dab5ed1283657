"""The console in a real browser over a real system: what a person sees and does there."""

from __future__ import annotations

import re

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.conftest import System
from tests.browser.page import PHONE, Page

LONG_PROMPT = "\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(36))


@pytest.fixture
def console(page: Page, system: System) -> Page:
    page.visit(system.url)
    page.wait(lambda: page.texts(".card.worker"))
    return page


def bar_starts(console: Page) -> dict[str, list[float]]:
    """Left ends of the bars by lane, in pixels."""
    lanes = console.script(
        "return [...document.querySelectorAll('.lane-row')].map((lane) =>"
        " [lane.dataset.key, [...lane.querySelectorAll('.bar rect:first-child')]"
        "   .map((rect) => Number(rect.getAttribute('x')))])"
    )
    return dict(lanes)  # a dict of the driver's would be sorted by key


def test_the_page_loads_without_errors_and_asks_nobody_else(console: Page, system: System) -> None:
    console.run(max_tokens=4)
    assert console.console_errors() == []
    asked = {url for url in console.requested() if not url.startswith(("about:", "data:"))}
    assert asked
    assert {url for url in asked if not url.startswith(system.url)} == set()


def test_every_service_and_worker_is_shown(console: Page) -> None:
    names = console.texts(".card .name")
    edge = ["gateway", "scheduler", "tokenizer", "cache", "bus"]
    assert names[:5] == edge
    assert [name.rpartition("-")[0] for name in names[5:]] == ["prefill", "decode", "decode"]
    assert set(console.texts(".card .state")) == {"ready"}
    for label in [e.get_attribute("aria-label") for e in console.all(".kv svg")]:
        assert re.fullmatch(r"KV blocks: .*free [\d,]+", str(label))
    assert [text.split(",")[0] for text in console.texts(".card.worker .load")] == ["0 running"] * 3


def test_figures_move_with_the_load(console: Page) -> None:
    console.start(max_tokens=64)

    def speed() -> bool:
        values = dict(
            zip(console.texts(".figure .term"), console.texts(".figure .value"), strict=True)
        )
        return float(values["Output tokens/s"].replace(",", "")) > 0

    console.wait(speed)
    console.wait(lambda: console.text("#play-state") == "length", 60)
    assert "running" not in console.text("#play-state")


def test_the_playground_streams_and_measures(console: Page) -> None:
    console.fill("#seed", "7")
    lengths: set[int] = set()
    console.start(max_tokens=48)

    def is_over() -> bool:
        lengths.add(len(console.text("#answer")))
        return console.text("#play-state") not in {"", "running"}

    console.wait(is_over, 60)
    assert len(lengths) > 3, "the text did not come in pieces"
    names, values = console.texts("#play-figures dt"), console.texts("#play-figures dd")
    figures = dict(zip(names, values, strict=True))
    assert set(figures) == {"TTFT", "Tokens", "Tokens/s", "Total"}
    assert figures["Tokens"] == "48"
    first = console.text("#answer")
    console.run(max_tokens=48)
    assert console.text("#answer") == first, "the same seed must give the same text"


def test_stop_ends_the_request_everywhere(console: Page) -> None:
    console.start(max_tokens=1000)
    console.wait(lambda: console.text("#answer"))
    console.one("#stop").click()
    console.wait(lambda: console.text("#play-state") == "stopped")
    request_id = console.request_id()
    assert console.one("#run").is_enabled()

    def is_cancelled() -> bool:
        rows = [text for text in console.texts(".requests a") if request_id in text]
        return bool(rows) and "cancelled" in rows[0]

    console.wait(is_cancelled)


def test_a_refused_request_says_why(console: Page) -> None:
    console.run("x", max_tokens=32000)
    assert "max_tokens" in console.text("#play-state")


def test_a_requests_bars_come_in_order_across_the_services(console: Page) -> None:
    console.fill("#temperature", "0")  # what the draft model guesses best
    request_id = console.run(LONG_PROMPT, max_tokens=64)
    console.one("#play-link").click()
    console.wait(lambda: request_id in console.text("#waterfall-body"))
    console.wait(lambda: len(bar_starts(console)) == 5)
    lanes = bar_starts(console)
    keys = [key.split(" ")[0] for key in lanes]
    assert keys == ["tokenizer", "scheduler", "prefill", "kv", "decode"]
    for starts in lanes.values():
        assert len(starts) >= 2
    tokenize, admit, prefill, kv, decode = (starts[0] for starts in lanes.values())
    assert tokenize <= admit <= prefill < kv
    assert prefill < decode
    chunks = [text for text in console.texts(".bar.prefill title") if "tokens" in text]
    assert len(chunks) >= 3, "a long prompt is computed in several chunks"
    assert console.all(".bar.kv")
    assert console.all(".bar.step .accepted"), "the demo pair speculates"
    assert "first token" in console.texts(".first-token text")[0]
    assert len(console.texts("#waterfall tbody tr")) >= 9


def test_the_hand_off_can_be_seen_closer(console: Page) -> None:
    console.run(LONG_PROMPT, max_tokens=24)
    console.wait(lambda: len(bar_starts(console)) == 5)
    console.wait(lambda: "length" in console.text("#waterfall .line-figures"))

    def width() -> float:
        return float(console.script("return document.querySelector('.bar.span').getBBox().width"))

    before = width()
    console.script("document.querySelector('#zoom input[value=handoff]').click()")
    assert width() > 1.3 * before


def test_everything_works_without_a_mouse(console: Page) -> None:
    console.press(Keys.TAB)
    assert console.driver.switch_to.active_element.text == "Skip to the content"
    console.tab_to("#theme").send_keys(Keys.ENTER)
    assert console.text("#theme") == "Theme: light"
    console.press(Keys.ENTER)
    assert console.script("return document.documentElement.dataset.theme") == "dark"
    console.press(Keys.ENTER)
    console.tab_to("#prompt")
    console.press(Keys.CONTROL, "a", Keys.NULL, "def add(a, b):")
    console.tab_to("#max-tokens")
    console.press(Keys.CONTROL, "a", Keys.NULL, "16")
    console.tab_to("#run").send_keys(Keys.ENTER)
    console.wait(lambda: console.text("#play-state") in {"length", "stop"}, 60)
    console.tab_to("#play-link").send_keys(Keys.ENTER)
    console.wait(lambda: console.all(".lane-row"))
    console.wait(lambda: "length" in console.text("#waterfall .line-figures"))
    lane = console.tab_to(".lane-row")
    assert console.all(".bar.chosen")
    before = console.text(".readout")
    lane.send_keys(Keys.END)
    assert console.text(".readout") != before
    console.script("document.body.focus(); scrollTo(0, 0)")
    console.tab_to(".requests a")


def test_the_focus_survives_a_new_state(console: Page) -> None:
    console.run(max_tokens=4)
    console.wait(lambda: console.all(".requests a"))
    console.script("document.querySelector('.requests a').focus()")
    before = console.texts(".requests .quiet")
    console.wait(lambda: console.texts(".requests .quiet") != before)
    assert console.script("return document.activeElement.matches('.requests a')")


def test_a_phone_needs_no_sideways_scrolling(console: Page) -> None:
    console.run(LONG_PROMPT, max_tokens=16)
    console.resize(PHONE)
    console.one("#play-link").click()
    console.wait(lambda: console.all(".lane-row"))
    assert console.script("return document.documentElement.scrollWidth") == PHONE[0]
    wide = console.script(
        "return [...document.querySelectorAll('main *')]"
        ".filter((e) => !e.closest('svg, .scroll, .sr'))"
        ".filter((e) => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map((e) => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    small = console.script(
        "return [...document.querySelectorAll('button, input:not([type=radio]), select')]"
        ".filter((e) => e.offsetParent && e.getBoundingClientRect().height < 24).map((e) => e.id)"
    )
    assert small == []


def test_a_killed_worker_is_shown_as_lost(console: Page, system: System) -> None:
    worker_id = system.kill_decode_worker()
    selector = f'.card.worker[aria-label="{worker_id}"]'
    console.wait(lambda: "lost" in console.text(f"{selector} .state"))
    assert "Stopped answering" in console.text(selector)
    console.driver.refresh()
    console.wait(lambda: "lost" in console.text(f"{selector} .state"))
    assert len(console.run(max_tokens=4)) > 4, "the other worker goes on"
    assert console.text("#play-state") == "length"
