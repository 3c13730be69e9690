"""A real browser without a screen, driven over its own protocol: what a person sees, presses and types.

It is kept on loopback: names lead nowhere, and so does its proxy.
"""

import asyncio
import base64
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no Chromium is installed"
DEADLINE_SECONDS = 60.0
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-domain-reliability",
    "--disable-sync",
    "--disable-extensions",
    "--disable-features=MediaRouter,OptimizationHints,Translate,AutofillServerCommunication",
    "--metrics-recording-only",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=127.0.0.1;localhost",
    "--remote-debugging-address=127.0.0.1",
    "--remote-debugging-port=0",
)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "Space": 32, "ArrowDown": 40}
# Told by the page itself when it changes: nobody looks again and again.
_WAIT = """new Promise((done) => {
  let watch;
  const look = () => {
    let found = null;
    try { found = (() => (%s))(); } catch {}
    if (!found) return false;
    if (watch) watch.disconnect();
    done(true);
    return true;
  };
  if (look()) return;
  watch = new MutationObserver(look);
  watch.observe(document, { attributes: true, characterData: true, childList: true, subtree: true });
})"""


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self._session = ""
        self.complaints: list[str] = []
        """Exceptions of scripts, what the policy refused, dialogs of scripts."""
        self.requests: list[str] = []

    async def listen(self) -> None:
        """Take what the browser says, until it ends."""
        async for message in self._socket:
            told = json.loads(message)
            if (number := told.get("id")) is not None:
                if not (answer := self._answers.pop(number)).cancelled():
                    answer.set_result(told)
                continue
            self._note(told.get("method"), told.get("params", {}))

    def _note(self, method: str | None, told: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self._loaded.set()
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(told["exceptionDetails"])[:2_000])
            case "Log.entryAdded" if told["entry"]["source"] in ("security", "violation", "javascript"):
                self.complaints.append(told["entry"]["text"])
            case "Page.javascriptDialogOpening":
                self.complaints.append(f"dialog: {told['message']}")
            case "Network.requestWillBeSent":
                self.requests.append(told["request"]["url"])

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Have the browser do something."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        async with asyncio.timeout(DEADLINE_SECONDS):
            told = await answer
        if "error" in told:
            raise AssertionError(f"{method}: {told['error']}")
        return dict(told["result"])

    async def attach(self) -> None:
        """Open the tab."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")

    async def look(self, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        """Be a screen of this size."""
        phone = width < 600
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        await self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def goto(self, url: str) -> None:
        """Load a page."""
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self._loaded.wait()

    async def js(self, expression: str) -> Any:
        """Evaluate an expression in the page."""
        told = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in told:
            raise AssertionError(f"{expression}: {told['exceptionDetails']}")
        return told["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        try:
            await self.js(_WAIT % condition)
        except TimeoutError:
            shown = await self.js("document.body.innerText")
            raise AssertionError(f"never {condition}; complaints {self.complaints}; shown: {shown}") from None

    async def text(self, selector: str) -> str:
        """Read what an element shows."""
        return str(await self.js(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def focused(self) -> str:
        """Name what has the focus: its id, or its label or text."""
        return str(
            await self.js(
                "((one) => one.id || one.getAttribute('aria-label') || one.innerText || one.tagName)"
                "(document.activeElement)"
            )
        )

    async def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key."""
        code = KEYS[key]
        parts: dict[str, Any] = {"key": " " if key == "Space" else key, "code": key}
        parts |= {"windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        written = {"Enter": "\r", "Space": " "}.get(key)
        down = {"type": "keyDown", "text": written} if written else {"type": "rawKeyDown"}
        await self.call("Input.dispatchKeyEvent", **parts, **down)
        await self.call("Input.dispatchKeyEvent", **parts, type="keyUp")

    async def tab_to(self, name: str, *, most: int = 400) -> None:
        """Press Tab until something of this name, as `focused` gives it, has the focus."""
        for _ in range(most):
            await self.press("Tab")
            if await self.focused() == name:
                return
        raise AssertionError(f"no Tab leads to {name}")

    async def write(self, text: str) -> None:
        """Type into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def picture(self, path: Path, *, whole: bool = True) -> None:
        """Keep what is seen as a PNG."""
        more: dict[str, Any] = {}
        if whole:
            size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
            more = {"clip": size | {"x": 0, "y": 0, "scale": 1}, "captureBeyondViewport": True}
        told = await self.call("Page.captureScreenshot", format="png", **more)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(told["data"]))


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Page]:
    """Start a browser with one tab; `folder` is empty, and its own."""
    assert PATH is not None
    process = await asyncio.create_subprocess_exec(
        PATH,
        *FLAGS,
        f"--user-data-dir={folder}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)},
    )
    reading: asyncio.Task[None] | None = None
    try:
        assert process.stderr is not None
        async with asyncio.timeout(DEADLINE_SECONDS):
            while b"DevTools listening on " not in (line := await process.stderr.readline()):
                assert line, "the browser ended"
        reading = asyncio.create_task(_drop(process.stderr), name="browser: what it says")
        url = line.decode().split()[-1]
        async with connect(url, max_size=None, proxy=None, compression=None) as socket:
            page = Page(socket)
            listening = asyncio.create_task(page.listen(), name="browser: listen")
            try:
                await page.attach()
                await page.look()
                yield page
                await page.call("Browser.close")
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
    finally:
        if process.returncode is None:
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        if reading is not None:
            await reading


async def _drop(stream: asyncio.StreamReader) -> None:
    while await stream.read(65_536):
        pass
