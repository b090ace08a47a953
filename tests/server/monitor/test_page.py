"""The page in a real browser: under its own Content-Security-Policy, with values that change, and deaf to markup."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, executable

from seedbed.common.events import Event, EventLog
from seedbed.server.monitor import web
from seedbed.server.monitor.document import to_json
from seedbed.server.monitor.reader import RunReader

FOUND = executable()
in_browser = pytest.mark.skipif(
    FOUND is None or sys.platform == "win32",
    reason="no Chromium here: `apt-get install chromium`, `playwright install chromium`, or name one in SEEDBED_BROWSER",
)
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


class Served:
    """A run directory and what a gateway would serve of it."""

    def __init__(self, run: Path) -> None:
        (run / "config.yaml").write_text("name: valley\n")
        self.log = EventLog(run / "events.jsonl")
        self.asked: list[str] = []
        served, reader = self, RunReader(run)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.asked.append(self.path)
                body, kind = web.page(), "text/html; charset=utf-8"
                if self.path == "/status.json":
                    body, kind = json.dumps(to_json(reader.look())), "application/json"
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Security-Policy", web.CSP)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def tell(self, kind: Any, node: str = "", name: str = "", **detail: Any) -> None:
        self.log.append(Event(kind=kind, node=node, name=name, detail=detail))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Address:
    """What `Browser.look` takes for a file."""

    def __init__(self, url: str) -> None:
        self.url = url

    def resolve(self) -> Address:
        return self

    def as_uri(self) -> str:
        return self.url


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    opened = Served(tmp_path)
    opened.tell("stage", name="experts", total=3)
    opened.tell("node", "ada", state="joined", tasks=["sums"], devices=["A100"])
    for number in range(1, 6):
        opened.tell("step", "ada", "expert:sums", step=number, steps=10, loss=10 / number, tokens=100, seconds=number)
    opened.tell("step", "bob", "expert:poems", step=1, steps=10, loss=2.0, tokens=100, seconds=1.0)
    opened.tell("accepted", "bob", "expert:poems", digest="ab" * 32, seconds=6.0, bytes=2_000_000, norm=1.5)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert FOUND is not None
    with Browser(FOUND) as opened:
        yield opened


def ask(browser: Browser, expression: str) -> Any:
    return browser._call("Runtime.evaluate", {"expression": expression, "returnByValue": True})["result"].get("value")


def until(browser: Browser, expression: str) -> Any:
    """The value of an expression once it is true."""
    end = time.monotonic() + 60
    while not (value := ask(browser, expression)):
        assert time.monotonic() < end, f"{expression} stays {value!r}"
        time.sleep(0.1)
    return value


def text(browser: Browser, key: str) -> str:
    return str(ask(browser, f"document.getElementById({key!r}).textContent"))


@in_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, False)])
def test_the_page_is_whole_on_a_phone_and_a_desk_and_asks_nobody_else(
    browser: Browser, served: Served, width: int, dark: bool
) -> None:
    browser.look(Address(served.url), width, dark=dark)  # type: ignore[arg-type]
    until(browser, "document.querySelectorAll('#now svg').length === 1")
    sight = browser.look(Address(served.url), width, dark=dark)  # type: ignore[arg-type]
    until(browser, "document.querySelectorAll('#now svg').length === 1")
    assert sight.errors == []
    assert {request.startswith((served.url, "data:")) for request in sight.requests} == {True}
    wide = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - document.documentElement.clientWidth"
    assert ask(browser, wide) <= 0
    assert ask(browser, "document.querySelector('#now .line').getBoundingClientRect().width") > 50
    assert ask(browser, "document.querySelector('#now svg').getBoundingClientRect().height") > 50
    titles = ask(browser, "[...document.querySelectorAll('#now svg title')].map(one => one.textContent)")
    assert titles == ["Loss of expert:sums, ada: 10.000 at step 1, 2.000 at step 5 of 10."]
    ink = ask(browser, "getComputedStyle(document.body).color")
    paper = ask(browser, "getComputedStyle(document.body).backgroundColor")
    bright = [sum(map(int, colour[4:-1].split(","))) for colour in (ink, paper)]
    assert (bright[0] > bright[1]) is dark


@in_browser
def test_values_change_when_the_run_goes_on_without_loading_again(browser: Browser, served: Served) -> None:
    browser.look(Address(served.url), 800)  # type: ignore[arg-type]
    until(browser, "document.getElementById('arrived').textContent === '1'")
    assert "Stage experts: 0 of 3" in text(browser, "answer")
    ask(browser, "window.kept = document.querySelector('#now figure')")
    served.tell("step", "ada", "expert:sums", step=6, steps=10, loss=1.25, tokens=600, seconds=6.0)
    served.tell("contributed", "eve", "hers", digest="cd" * 32, task="sums")
    until(browser, "document.querySelector('#now title').textContent.includes('1.250 at step 6')")
    assert text(browser, "contributed") == "1"
    assert ask(browser, "window.kept === document.querySelector('#now figure')"), "elements are changed in place"
    served.tell("finished")
    until(browser, "document.getElementById('answer').textContent === 'The federation has finished.'")
    served.close()
    until(browser, "!document.getElementById('notice').hidden")
    assert "No answer" in text(browser, "notice")


@in_browser
def test_what_participants_call_themselves_is_text_and_nothing_else(browser: Browser, served: Served) -> None:
    served.tell("node", EVIL, state="joined", tasks=[EVIL], devices=[EVIL])
    served.tell("step", EVIL, EVIL, step=1, steps=2, loss=1.0)
    served.tell("quarantined", EVIL, f"job {EVIL}", reason=EVIL)
    served.tell("contributed", EVIL, EVIL, digest=EVIL, task=EVIL)
    served.tell("accepted", EVIL, f"done {EVIL}", digest=EVIL)
    served.tell("note", text=EVIL)
    served.tell("failed", reason=EVIL)
    sight = browser.look(Address(served.url), 800)  # type: ignore[arg-type]
    until(browser, "document.getElementById('nodes').textContent.includes('<img')")
    assert sight.errors == []
    assert ask(browser, "document.querySelectorAll('img').length") == 0
    assert ask(browser, "document.querySelectorAll('script').length") == 1
    assert ask(browser, "document.title") == "valley: failed"
    assert text(browser, "reason") == EVIL
    assert set(served.asked) <= {"/", "/status.json"}


def test_the_policy_names_the_scripts_that_the_page_has() -> None:
    import base64
    import hashlib
    import re

    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", web.page(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in web.CSP
    assert "default-src 'none'" in web.CSP
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", web.page())
    assert " style=" not in web.page(), "the policy forbids it"


def test_the_page_never_makes_markup_of_data() -> None:
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in web.page()
