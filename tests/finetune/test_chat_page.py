"""The chat in a real browser: Chromium without a window, where it, playwright and gradio are installed."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from chats import chat_model
from processes import wait_until

from megazh.errors import UsageError
from megazh.finetune.chat import ChatModel, ChatOptions
from megazh.finetune.chat_page import Page, serve
from megazh.model.sampling import SamplingOptions

pytest.importorskip("gradio", reason="the extra web is not installed (bash jobs/setup.sh --web)")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
OPTIONS = ChatOptions(SamplingOptions(temperature=0.0), max_tokens=300)
TITLE = "runs/demo-sft: template chatml"
MARKUP = "<img src=x onerror='window.harmed=1'><b>粗</b>"


class Scripted:
    """Answers in their order; the one that begins with `慢` goes on token by token as the test allows."""

    def __init__(self, model: ChatModel) -> None:
        self.model, self.answers, self.allowed = model, [], threading.Semaphore(0)
        """Tokens of a slow answer that may be given."""
        self.options: list[ChatOptions] = []
        self.prompts: list[str] = []
        model.tokens = self.tokens  # type: ignore[method-assign,assignment]

    def tokens(self, prompt: list[int], count: int, options: ChatOptions) -> Iterator[int]:
        self.options.append(options)
        self.prompts.append(self.model.tokenizer.decode(prompt))
        answer = self.answers.pop(0)
        for number, token in enumerate(self.model.tokenizer.encode(answer)[:count]):
            if answer.startswith("慢") and number > 4:
                self.allowed.acquire(timeout=30)
            yield token

    def next_token(self) -> None:
        self.allowed.release()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def script() -> Scripted:
    return Scripted(chat_model(context=1024))


@pytest.fixture(scope="module")
def asked_for() -> Iterator[set[str]]:
    """The hosts that this process has looked up or connected to."""
    hosts: set[str] = set()
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def looked_up(host: Any, *rest: Any, **more: Any) -> Any:
        hosts.add(str(host))
        return look_up(host, *rest, **more)

    def connected(self: socket.socket, address: Any) -> None:
        hosts.add(str(address[0]) if isinstance(address, tuple) else "unix")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", looked_up)
        patch.setattr(socket.socket, "connect", connected)
        yield hosts


@pytest.fixture(scope="module")
def served(script: Scripted, asked_for: set[str]) -> Iterator[Page]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = serve(script.model, OPTIONS, "你是助手。", TITLE, "127.0.0.1", port)
    yield page
    page.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def opened(browser: Any, served: Page, addresses: list[str]) -> Any:
    """The page in a tab of its own."""
    tab = browser.new_context(viewport={"width": 1100, "height": 900}).new_page()
    tab.set_default_timeout(30_000)
    tab.on("request", lambda request: addresses.append(request.url))
    tab.goto(served.url)
    tab.wait_for_selector("#message textarea")
    return tab


def send(tab: Any, text: str) -> None:
    tab.fill("#message textarea", text)
    tab.click("#send")


def shown(tab: Any) -> str:
    return str(tab.inner_text("#messages"))


def test_a_conversation_in_a_browser(
    browser: Any, served: Page, script: Scripted, asked_for: set[str], tmp_path: Path
) -> None:
    addresses: list[str] = []
    tab = opened(browser, served, addresses)
    script.answers += ["它叫**雪团**。\n\n* 一\n* 二", MARKUP, "慢" + "好" * 280, "重来", "住在河边。"]
    send(tab, "小兔子叫什么名字？")
    tab.wait_for_selector("#messages strong:has-text('雪团')")
    tab.wait_for_selector("#messages li:has-text('二')")
    send(tab, MARKUP)
    wait_until(lambda: shown(tab).count("粗") >= 2, 30, "the second answer")
    assert tab.evaluate("window.harmed") is None, "markup in messages is not run"

    send(tab, "说慢一点\n两行")
    wait_until(lambda: "慢" in shown(tab).partition("两行")[2], 30, "the begin of a slow answer, while it is written")
    for _ in range(6):
        script.next_token()
    tab.click("#stop")
    wait_until(lambda: script.next_token() or "interrupted" in tab.inner_text("#note"), 20, "the end of the answer")
    assert tab.inner_text("#note") == "(interrupted; the answer stays in the conversation as shown)"
    assert shown(tab).count("好") < 200

    tab.click("#retry")
    tab.wait_for_selector("#messages:has-text('重来')")
    assert script.prompts[-1] == script.prompts[-2]
    assert "慢好" not in shown(tab)

    tab.click("#settings button")
    wait_until(lambda: tab.input_value("#system textarea") == "你是助手。", 30, "the settings")
    tab.wait_for_timeout(500)
    tab.fill("#system textarea", "短一点。")
    tab.press("#system textarea", "Tab")
    tab.fill("#max_tokens input[type=number]", "20")
    tab.press("#max_tokens input[type=number]", "Tab")
    send(tab, "它住在哪里？")
    tab.wait_for_selector("#messages:has-text('住在河边。')")
    assert "短一点。" in script.prompts[-1]
    assert "雪团" in script.prompts[-1], "history"
    assert (script.options[-1].max_tokens, script.options[-1].sampling.temperature) == (20, 0)
    tab.screenshot(path=tmp_path / "chat.png")

    other = opened(browser, served, addresses)
    assert "雪团" not in shown(other), "another tab has another conversation"
    send(other, "长" * 1100)
    other.wait_for_selector("text=give a shorter one")
    assert other.input_value("#message textarea") == "长" * 1100, "the message can be shortened"
    tab.click("#reset")
    wait_until(lambda: "雪团" not in shown(tab), 30, "an empty conversation")
    outside = [each for each in addresses if not each.startswith((served.url, "data:", "blob:"))]
    assert outside == [], "the page needs nothing from elsewhere"
    assert asked_for <= {"127.0.0.1", "localhost", "unix"}, "nor does the server"


def test_it_listens_on_this_machine_alone(served: Page) -> None:
    port = int(served.url.rstrip("/").rpartition(":")[2])
    listening = [
        each.laddr.ip for each in psutil.Process().net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port
    ]  # fmt: skip
    assert (served.url, listening) == (f"http://127.0.0.1:{port}/", ["127.0.0.1"])


def test_a_port_that_is_taken(served: Page, script: Scripted) -> None:
    port = int(served.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(UsageError, match=rf"--port {port}: cannot listen on 127\.0\.0\.1:{port} "):
        serve(script.model, OPTIONS, None, TITLE, "127.0.0.1", port)
