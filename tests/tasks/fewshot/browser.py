"""A small client of chromedriver: the few commands of WebDriver that a page test needs."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which WebDriver names an element."""


def free_port() -> int:
    """Return a port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Browser:
    """A headless Chromium whose name resolution knows this computer only."""

    def __init__(self, size: tuple[int, int] = (1360, 1200), downloads: Path | None = None) -> None:
        port = free_port()
        self._driver = subprocess.Popen(
            [str(CHROMEDRIVER), f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._base = f"http://127.0.0.1:{port}"
        wait(lambda: _answers(f"{self._base}/status"), 30, "chromedriver does not start")
        options = {
            "binary": CHROMIUM,
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--disable-gpu",
                "--disable-background-networking",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                f"--window-size={size[0]},{size[1]}",
            ],
            "prefs": {"download.default_directory": str(downloads)} if downloads else {},
        }
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
        }
        try:
            answer = self._call("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
        except BaseException:
            self._driver.terminate()
            raise
        self._base += f"/{answer['sessionId']}"
        self._performance: list[dict[str, Any]] = []

    def close(self) -> None:
        """End browser and driver."""
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait()

    def open(self, url: str) -> None:
        """Load a page in the current tab."""
        self._call("POST", "/url", {"url": url})

    def new_tab(self) -> str:
        """Open a tab, go there, and return its name."""
        handle = self._call("POST", "/window/new", {"type": "tab"})["handle"]
        self.go(handle)
        return handle

    def go(self, handle: str) -> None:
        """Go to a tab."""
        self._call("POST", "/window", {"handle": handle})

    @property
    def tab(self) -> str:
        """Name of the current tab."""
        return self._call("GET", "/window")

    def close_tab(self) -> None:
        """Close the current tab."""
        self._call("DELETE", "/window")

    def find(self, css: str, seconds: float = 60.0) -> str:
        """Return the first element of a selector, as soon as there is one."""
        return wait(lambda: self.all(css), seconds, f"no {css}")[0]

    def all(self, css: str) -> list[str]:
        """Return all elements of a selector."""
        found = self._call("POST", "/elements", {"using": "css selector", "value": css})
        return [item[ELEMENT] for item in found]

    def click(self, css: str) -> None:
        """Click an element, scrolled into view, as soon as nothing moves or lies over it."""

        def clicked() -> bool:
            element = self.find(css)
            self.run("arguments[0].scrollIntoView({block: 'center'})", element)
            try:
                self._call("POST", f"/element/{element}/click", {})
            except RuntimeError as error:
                if "intercepted" in str(error) or "stale" in str(error):
                    return False
                raise
            return True

        wait(clicked, 20, f"{css} cannot be clicked")

    def type(self, css: str, text: str) -> None:
        """Type into a field, instead of what was there."""
        element = self.find(css)
        self._call("POST", f"/element/{element}/clear", {})
        self._call("POST", f"/element/{element}/value", {"text": text})

    def upload(self, css: str, files: Sequence[Path]) -> None:
        """Choose files in a file field."""
        text = "\n".join(str(file) for file in files)
        self._call("POST", f"/element/{self.find(css)}/value", {"text": text})

    def text(self, css: str) -> str:
        """Return what is written in an element, or nothing if there is none."""
        found = self.all(css)
        return self._call("GET", f"/element/{found[0]}/text") if found else ""

    def run(self, script: str, *elements: str) -> Any:
        """Run a script with elements as arguments."""
        arguments = [{ELEMENT: element} for element in elements]
        return self._call("POST", "/execute/sync", {"script": script, "args": arguments})

    def screenshot(self, file: Path) -> None:
        """Save the whole page as a picture."""
        page = {"captureBeyondViewport": True}
        size = self._cdp("Page.getLayoutMetrics", {})["cssContentSize"]
        page["clip"] = {"x": 0, "y": 0, "width": 1360, "height": size["height"], "scale": 1}
        file.write_bytes(base64.b64decode(self._cdp("Page.captureScreenshot", page)["data"]))

    def requested(self) -> set[str]:
        """Return every address that was asked for so far, in all tabs."""
        self._performance += self._call("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in self._performance]
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }

    def complaints(self) -> list[str]:
        """Return the errors of the console since the last call."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def _cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _call(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        root, _, session = self._base.partition("//")
        host, _, name = session.partition("/")
        url = f"{root}//{host}/session{'/' + name if name else ''}{path}"
        data = None if verb != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        request.method = verb
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            value = json.load(error)["value"]
            raise RuntimeError(f"{verb} {path}: {value['message'].splitlines()[0]}") from None


def wait(look: Callable[[], Any], seconds: float, complaint: str) -> Any:
    """Return what `look` returns, as soon as that is something."""
    until = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > until:
            raise TimeoutError(complaint)
        time.sleep(0.1)
    return found


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False
