"""A real browser for tests: headless Chromium."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import axe_core_python
import pytest

from tests.conftest import require

AXE = Path(axe_core_python.__file__).parent / "axe.min.js"


class Browser:
    """Headless Chromium, spoken to over its DevTools pipe: JSON messages that end in a zero byte, on descriptors 3 and
    4."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        require(program, "needs a browser: apt-get update && apt-get install -y chromium")
        assert program is not None
        switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        switches += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
        switches += [f"--user-data-dir={profile}", "--window-size=2600,2100"]  # what is out of sight is not drawn
        pipes = [*os.pipe(), *os.pipe()]
        there, self._write, self._read, back = [
            fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in pipes
        ]  # clear of 3 and 4
        shell = ["bash", "-c", f'exec "$0" "$@" 3<&{there} 4>&{back}', program, *switches]
        self._process = subprocess.Popen(
            shell, pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (*pipes, there, back):
            os.close(end)
        self._calls, self._rest, self._session = 0, b"", {}
        self.events: list[dict[str, Any]] = []
        """What the browser said unasked, of the domains that were enabled."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def call(self, method: str, **params: Any) -> Any:
        self._calls += 1
        os.write(
            self._write,
            json.dumps({"id": self._calls, "method": method, "params": params, **self._session}).encode() + b"\0",
        )
        while True:
            while b"\0" not in self._rest:
                chunk = os.read(self._read, 1 << 20)
                assert chunk, "the browser is gone"
                self._rest += chunk
            message, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == self._calls:
                assert "result" in answer, answer
                return answer["result"]
            self.events.append(answer)

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str, ready: str, seconds: float = 180) -> None:
        """Returns when the script `ready` is true on the page."""
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + seconds
        while not self._ready(ready):
            assert time.monotonic() < deadline, self.evaluate("document.body.innerText")
            time.sleep(0.2)

    def _ready(self, script: str) -> bool:
        """A page that leads on to another one may leave while it is asked."""
        try:
            return bool(self.evaluate(script))
        except AssertionError as error:
            if "navigated or closed" not in str(error):
                raise
            return False

    def violations(self) -> list[tuple[str, int, str]]:
        """What axe-core finds against WCAG A and AA on this page: rule, number of places, the first of them."""
        self.evaluate(AXE.read_text(encoding="utf-8"))
        rules = "{runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'], resultTypes: ['violations']}"
        rows = "found.violations.map((one) => [one.id, one.nodes.length, one.nodes[0].html.slice(0, 200)])"
        script = f"axe.run(document, {rules}).then((found) => {rows})"
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return [tuple(row) for row in answer["result"]["value"]]

    def close(self) -> None:
        with suppress(AssertionError, BrokenPipeError):
            self.call("Browser.close")
        self._process.wait(30)
        os.close(self._write)
        os.close(self._read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield browser
    browser.close()
