"""Drives the server's page in a real browser, checks what it shows, and takes screenshots.

Needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver). The browser is
headless, in a profile of its own, and is told of no other address than the server's.

    python benchmarks/page.py --screenshots DIR

Exits with an error if the page shows something wrong, writes to the console, or asks any other
address than the server it came from.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving import build_export, served

SIZES = {"wide": (1200, 900), "narrow": (380, 900)}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
)


class Browser:
    """A session of chromium over the WebDriver protocol."""

    def __init__(self, driver: str, dark: bool, size: tuple[int, int]) -> None:
        self._driver = driver
        profile = tempfile.mkdtemp()
        options = {
            "args": [*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        }
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        answer = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._path = f"/session/{answer['sessionId']}"
        self._profile = profile
        # A window is never as narrow as a phone; the page can be told that it is.
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", {"features": [scheme]})

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {error.read().decode()[:500]}") from error

    def command(self, name: str, parameters: dict[str, Any]) -> Any:
        """Gives a command of the DevTools protocol."""
        return self._ask(
            "POST", self._path + "/goog/cdp/execute", {"cmd": name, "params": parameters}
        )

    def open(self, url: str) -> None:
        """Opens a page."""
        self._ask("POST", self._path + "/url", {"url": url})

    def run(self, script: str) -> Any:
        """Runs JavaScript; returns what it returns."""
        return self._ask("POST", self._path + "/execute/sync", {"script": script, "args": []})

    def until(self, script: str, seconds: float = 30) -> Any:
        """Waits until an expression is true; returns it."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {script}")):
            if time.monotonic() > end:
                raise AssertionError(f"Not within {seconds} s: {script}")
            time.sleep(0.05)
        return value

    def _element(self, selector: str) -> str:
        body = {"using": "css selector", "value": selector}
        found: dict[str, str] = self._ask("POST", self._path + "/element", body)
        return f"{self._path}/element/{next(iter(found.values()))}"

    def click(self, selector: str) -> None:
        """Clicks, as a person does: what is covered or hidden cannot be clicked."""
        self._ask("POST", self._element(selector) + "/click", {})

    def type(self, selector: str, text: str) -> None:
        """Replaces the text of a field; a newline sends the form."""
        self._ask("POST", self._element(selector) + "/clear", {})
        self._ask("POST", self._element(selector) + "/value", {"text": text})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Reads a log since it was last read."""
        entries: list[dict[str, Any]] = self._ask("POST", self._path + "/se/log", {"type": kind})
        return entries

    def screenshot(self, path: Path) -> None:
        """Takes a picture of the whole page."""
        shot = self.command("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """Ends the session."""
        self._ask("DELETE", self._path)
        shutil.rmtree(self._profile, ignore_errors=True)


@contextlib.contextmanager
def chromedriver() -> Iterator[str]:
    """Runs chromedriver on a free port; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def try_page(browser: Browser, address: str, shots: Path, name: str) -> None:
    """Uses the page as a person would, and checks what it shows."""
    browser.open(address + "/")
    browser.until("document.querySelector('#about').textContent.includes('ScaNN index')")
    assert browser.run("return document.querySelector('#user').value") == "7"
    browser.click("#go")
    browser.until("document.querySelectorAll('#sides ol li').length === 20")
    note = browser.run("return document.querySelector('#note').textContent")
    assert "of the exact top 10" in note, note
    browser.screenshot(shots / f"{name}-user.png")

    browser.type("#user", "123456789\n")
    browser.until("document.querySelector('#note').textContent.includes('unknown to the model')")
    browser.type("#user", "me\n")
    browser.until("document.querySelector('#problem').textContent.includes('integers')")
    assert browser.run("return document.querySelector('#answer').hidden")
    browser.screenshot(shots / f"{name}-problem.png")

    browser.click("input[value=items]")
    for words in ("item 17 of", "item 21"):
        browser.type("#search", words)
        browser.until("document.querySelectorAll('#found button').length > 0")
        if words == "item 21":
            browser.screenshot(shots / f"{name}-search.png")
        browser.click("#found li:first-child button")
        browser.until("document.querySelectorAll('#found button').length === 0")
    assert browser.run("return document.querySelectorAll('#picks button').length") == 2
    browser.click("#go")
    browser.until("document.querySelectorAll('#sides ol li').length === 20")
    browser.screenshot(shots / f"{name}-items.png")
    browser.click("#picks li:first-child button")
    assert browser.run("return document.querySelectorAll('#picks button').length") == 1
    wide = browser.run(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert wide <= 0, f"{name}: {wide} pixels too wide"


def check_logs(browser: Browser, address: str) -> None:
    """Checks that nothing was asked elsewhere, and that only refused queries were logged."""
    for entry in browser.log("browser"):
        is_refusal = "page/query" in entry["message"] and "400" in entry["message"]
        assert is_refusal, entry["message"]
    asked = set()
    for entry in browser.log("performance"):
        message = json.loads(entry["message"])["message"]
        is_request = message["method"] == "Network.requestWillBeSent"
        # Not what the browser's own start page asked.
        if is_request and message["params"]["documentURL"].startswith(address):
            asked.add(message["params"]["request"]["url"])
    outside = {url for url in asked if not url.startswith((address + "/", "data:"))}
    assert asked, "no request was logged"
    assert not outside, outside


def main() -> None:
    """Runs the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="A ScaNN model made by benchmarks/serving.py.")
    parser.add_argument("--screenshots", type=Path, default=Path("screenshots"), metavar="DIR")
    options = parser.parse_args()
    options.screenshots.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if options.model is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            options.model = build_export(directory, 20_000, seed=0).parent
        port, _ = stack.enter_context(served(options.model))
        driver = stack.enter_context(chromedriver())
        address = f"http://127.0.0.1:{port}"
        for size, pixels in SIZES.items():
            for dark in (False, True):
                name = f"{size}-{'dark' if dark else 'light'}"
                browser = Browser(driver, dark, pixels)
                try:
                    try_page(browser, address, options.screenshots, name)
                    check_logs(browser, address)
                finally:
                    browser.close()
                print(f"{name}: as it should be")


if __name__ == "__main__":
    main()
