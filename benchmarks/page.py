"""Drives the server's page in a real browser, checks what it shows, and takes screenshots.

Needs chromium (Debian: apt-get install chromium). The browser is headless, has its own profile, is
driven through a pipe, and is given no other address than the server's.

    python benchmarks/page.py --screenshots DIR
    python benchmarks/page.py --report runs/NAME/report.html    # Takes the picture of the guide.

Exits with an error if the page shows something wrong, writes to the console, or calls any other
address than its server's.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from serving import build_export, served

PICTURE = Path(__file__).parents[1] / "docs" / "figures" / "report.png"
SIZES = {"wide": (1200, 900), "narrow": (380, 900)}
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
)
KEYS = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40}


class Browser:
    """A page of chromium, over the DevTools protocol: JSON with NUL after it, on files 3 and 4."""

    def __init__(self, dark: bool, size: tuple[int, int]) -> None:
        self._stack = contextlib.ExitStack()
        profile = self._stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        command = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec chromium "$@" about:blank'
        self._process = subprocess.Popen(
            ["bash", "-c", command, "chromium", *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb", 0)
        self._left, self._number, self._session = b"", 0, {}
        self.events: list[dict[str, Any]] = []
        targets = self.command("Target.getTargets")["targetInfos"]
        (page,) = (each for each in targets if each["type"] == "page")
        attached = self.command("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")
        # A window cannot be as narrow as a phone, so the page is told that it is.
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._stack.close()

    def command(self, method: str, **parameters: Any) -> Any:
        """Gives a command and waits for its answer; events on the way are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._left:
                self._left += self._in.read(1 << 20) or _gone()
            text, _, self._left = self._left.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def run(self, script: str) -> Any:
        """Evaluates JavaScript; returns its value."""
        done = self.command("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in done:
            raise AssertionError(f"{script}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def until(self, script: str, seconds: float = 30) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end:
                raise AssertionError(f"Not within {seconds} s: {script}")
            time.sleep(0.05)

    def type(self, selector: str, text: str) -> None:
        """Replaces the text of a field."""
        self.run(
            f"(() => {{const x = document.querySelector('{selector}'); x.focus(); x.select();}})()"
        )
        self.command("Input.insertText", text=text)

    def key(self, name: str) -> None:
        """Presses a key."""
        key = {"key": name, "code": name, "windowsVirtualKeyCode": KEYS[name]}
        text = {"text": "\r"} if name == "Enter" else {}
        self.command("Input.dispatchKeyEvent", type="keyDown", **key, **text)
        self.command("Input.dispatchKeyEvent", type="keyUp", **key)

    def screenshot(self, path: Path, **clip: float) -> None:
        """Takes a picture of the whole page, or of a part of it."""
        part = {"clip": {**clip, "scale": 1}} if clip else {}
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=True, **part)
        path.write_bytes(base64.b64decode(shot["data"]))


def _gone() -> bytes:
    raise RuntimeError("chromium has ended")


def try_page(browser: Browser, address: str, shots: Path, name: str) -> None:
    """Uses the page as a person would, and checks what it shows."""
    browser.command("Page.navigate", url=address + "/")
    # It opens with an example, and the history of its user beside it.
    browser.until("document.querySelectorAll('#sides .side').length === 3")
    browser.until("document.querySelector('#about').textContent.includes('ScaNN index')")
    assert browser.run("document.querySelector('#user').value") == "0"
    assert browser.run("document.querySelectorAll('#sides ol:not(.history) li').length") == 20
    assert "of the exact top 10" in browser.run("document.querySelector('#note').textContent")
    assert "retrieve_user" in browser.run("document.querySelector('#curl').textContent")
    browser.screenshot(shots / f"{name}-user.png")

    first = "document.querySelector('#sides ol:not(.history) li')"
    browser.run(f"{first}.querySelector('.ask:last-of-type').click()")
    browser.until(f"{first}.querySelector('.why').textContent.includes('rank 1, score')")
    browser.screenshot(shots / f"{name}-why.png")

    title = browser.run(f"{first}.querySelector('.title').textContent")
    browser.run(f"{first}.querySelector('.ask').click()")
    browser.until(f"document.querySelector('#note').textContent.startsWith('Similar to {title}:')")
    assert browser.run("document.activeElement.id") == "note"
    titles = "[...document.querySelectorAll('#sides .title')].map((x) => x.textContent)"
    found = browser.run(titles)
    assert len(found) == 20
    assert title not in found
    browser.screenshot(shots / f"{name}-similar.png")

    browser.type("#user", "123456789")
    browser.key("Enter")
    browser.until("document.querySelector('#note').textContent.includes('does not know this user')")
    browser.type("#user", "me")
    browser.key("Enter")
    browser.until("document.querySelector('#problem').textContent.includes('integers')")
    assert browser.run("document.querySelector('#answer').hidden")
    browser.screenshot(shots / f"{name}-problem.png")

    browser.run("document.querySelector('input[value=items]').click()")
    num_picks = browser.run("document.querySelectorAll('#picks button').length")
    browser.type("#search", "item 21")
    browser.until("document.querySelectorAll('#found li[role=option]').length > 2")
    browser.key("ArrowDown")
    second = browser.run("document.querySelectorAll('#found li')[1].textContent")
    assert browser.run("document.querySelector('[aria-selected=true]').textContent") == second
    browser.screenshot(shots / f"{name}-search.png")
    browser.key("Enter")  # Picks; in an empty field, sends.
    browser.until("document.querySelectorAll('#found li').length === 0")
    picks = "document.querySelectorAll('#picks button').length"
    assert browser.run(picks) == num_picks + 1
    browser.key("Enter")
    browser.until("document.querySelectorAll('#sides .side').length === 2")
    browser.screenshot(shots / f"{name}-items.png")
    browser.run("document.querySelector('#picks button').click()")
    assert browser.run(picks) == num_picks
    wide = browser.run(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert wide <= 0, f"{name}: {wide} pixels too wide"


def picture(report: Path) -> None:
    """Takes a picture of the two verdicts at the top of a run's report."""
    with Browser(False, (1000, 800)) as browser:
        browser.command("Page.navigate", url=report.absolute().as_uri())
        browser.until("document.querySelectorAll('.card').length > 2")
        bottom = "document.querySelectorAll('.card')[1].getBoundingClientRect().bottom"
        browser.screenshot(PICTURE, x=0, y=0, width=1000, height=browser.run(bottom) + 16)


def check_events(events: list[dict[str, Any]], address: str) -> None:
    """Checks that no other address was called, and that only refused queries were logged."""
    of = {
        method: [event["params"] for event in events if event["method"] == method]
        for method in ("Runtime.exceptionThrown", "Log.entryAdded", "Network.requestWillBeSent")
    }
    assert not of["Runtime.exceptionThrown"], of["Runtime.exceptionThrown"]
    for entry in of["Log.entryAdded"]:
        is_refusal = "page/query" in entry["entry"].get("url", "") and "400" in str(entry)
        assert is_refusal, entry
    asked = {request["request"]["url"] for request in of["Network.requestWillBeSent"]}
    assert asked, "no request was logged"
    outside = {url for url in asked if not url.startswith((address + "/", "data:"))}
    assert not outside, outside


def main() -> None:
    """Runs the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="A ScaNN model made by benchmarks/serving.py.")
    parser.add_argument("--report", type=Path, help="A run's report, for the picture alone.")
    parser.add_argument("--screenshots", type=Path, default=Path("screenshots"), metavar="DIR")
    options = parser.parse_args()
    if options.report:
        return picture(options.report)
    options.screenshots.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if options.model is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            options.model = build_export(directory, 20_000, seed=0).parent
        port, _ = stack.enter_context(served(options.model))
        address = f"http://127.0.0.1:{port}"
        for size, pixels in SIZES.items():
            for dark in (False, True):
                name = f"{size}-{'dark' if dark else 'light'}"
                with Browser(dark, pixels) as browser:
                    try_page(browser, address, options.screenshots, name)
                    check_events(browser.events, address)
                print(f"{name}: as it should be")


if __name__ == "__main__":
    main()
