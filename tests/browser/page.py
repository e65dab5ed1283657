"""A Chromium window with the console in it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
WAIT_S = 30
WIDE = (1280, 900)
PHONE = (360, 740)


class Page:
    """What the tests do with a browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    @classmethod
    def open(cls, chromium: str, chromedriver: str, profile: Path) -> Page:
        """Starts a browser with an empty profile."""
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        return cls(webdriver.Chrome(options=options, service=Service(chromedriver)))

    def close(self) -> None:
        self.driver.quit()

    def reset(self) -> None:
        self.driver.get("about:blank")
        self.resize(WIDE)
        self.theme("light")
        self.console_errors()
        self.requested()

    def visit(self, url: str, *, has_state: bool = True) -> None:
        """Opens the console and waits for the first state."""
        self.driver.get(f"{url}/console")
        if has_state:
            self.wait(lambda: self.text("#link-state") == "live")

    def resize(self, size: tuple[int, int]) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def theme(self, name: str) -> None:
        """What the system prefers, light or dark."""
        features = [
            {"name": "prefers-color-scheme", "value": name},
            {"name": "prefers-reduced-motion", "value": "reduce"},  # nothing glides under a click
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def script(self, source: str, *arguments: Any) -> Any:
        return self.driver.execute_script(source, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Text of the first element; empty without one."""
        found = self.script("return document.querySelector(arguments[0])?.innerText", selector)
        return str(found or "").strip()

    def texts(self, selector: str) -> list[str]:
        source = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return [str(text) for text in self.script(source, selector)]

    def wait(self, condition: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
        """The condition's first truthy value. Elements may be replaced while it is tried."""
        ignored = (StaleElementReferenceException,)
        waiting = WebDriverWait(self.driver, timeout_s, 0.05, ignored)
        return waiting.until(lambda _: condition())

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, selector: str, limit: int = 120) -> WebElement:
        """Presses Tab until an element has the focus: somebody without a mouse gets there."""
        for _ in range(limit):
            focused = self.driver.switch_to.active_element
            if self.script("return arguments[0].matches(arguments[1])", focused, selector):
                return focused
            self.press(Keys.TAB)
        raise AssertionError(f"Tab does not lead to {selector}")

    def fill(self, selector: str, value: str) -> None:
        element = self.one(selector)
        element.clear()
        element.send_keys(value)

    def run(self, prompt: str = "", *, max_tokens: int = 32) -> str:
        """Runs a request to its end in the playground; returns its id."""
        self.start(prompt, max_tokens=max_tokens)
        self.wait(lambda: self.text("#play-state") not in {"", "running"}, 60)
        return self.request_id()

    def start(self, prompt: str = "", *, max_tokens: int = 32) -> None:
        if prompt:
            self.script("document.getElementById('prompt').value = arguments[0]", prompt)
        self.fill("#max-tokens", str(max_tokens))
        self.wait(lambda: self.text("#model"))
        self.one("#run").click()

    def request_id(self) -> str:
        return str(self.one("#play-link").get_attribute("href")).partition("#request/")[2]

    def console_errors(self) -> list[str]:
        """What the page complained about since the last call."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def requested(self) -> set[str]:
        """Addresses that were asked for since the last call."""
        marker = '"method":"Network.requestWillBeSent"'
        found = set()
        for entry in self.driver.get_log("performance"):
            if marker in entry["message"]:
                found.add(entry["message"].partition('"url":"')[2].partition('"')[0])
        return found

    def save(self, path: Path, *, height: int | None = None, selector: str = "") -> None:
        """A picture of the window, of so much height from the top, or of one element."""
        top = 0
        width = int(self.script("return innerWidth"))
        if selector:
            box = self.script(
                "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
                "return [r.top + scrollY - 8, r.height + 16]",
                selector,
            )
            top, height = int(box[0]), int(box[1])
        whole = int(self.script("return document.documentElement.scrollHeight"))
        self.resize((width, max(whole, 600)))
        self.script("scrollTo(0, 0)")
        settled_at = time.monotonic() + 0.5
        self.wait(lambda: time.monotonic() > settled_at)
        clip = {"x": 0, "y": top, "width": width, "height": height or whole, "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})
        path.parent.mkdir(parents=True, exist_ok=True)

        path.write_bytes(base64.b64decode(shot["data"]))
