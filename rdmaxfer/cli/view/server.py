"""The server of the page, on a thread of its own. It gets a thin copy of a frame when one is asked for, and else once a second.

Only programs and browsers of this machine reach it; a page of another site that tries to, by the user's browser, is turned away by
its Host and Origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import threading
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import TYPE_CHECKING, Any

import rdmaxfer
from rdmaxfer.cli.failure import CommandError
from rdmaxfer.cli.view import picture

if TYPE_CHECKING:
    from aiohttp import web

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

EVERY_S = 0.5
"""How often numbers are told."""
KEEP_EVERY_S = 1.0
START_S = 10.0
HERE = {"127.0.0.1", "localhost", "[::1]"}
MAX_METADATA_CHARS = 2000


class Viewer:
    """Shows what `receiver` receives, at `url`. Raises CommandError if the port is taken, or aiohttp or Pillow is not installed."""

    def __init__(self, receiver: rdmaxfer.Receiver, port: int) -> None:
        try:
            import aiohttp
            import PIL
        except ImportError as error:
            raise CommandError(f"--view needs the package {error.name}.", fix="pip install 'rdmaxfer[view]'.") from None
        del aiohttp, PIL
        self._receiver = receiver
        self._port = port
        self.url = ""
        self._wanted = threading.Event()
        """Somebody looks, and waits for a picture."""
        self._kept_s = -math.inf
        self._fresh: asyncio.Condition | None = None
        self._latest: tuple[dict[str, Any], Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._error: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, name="rdmaxfer-view", daemon=True)
        self._thread.start()
        self._started.wait(START_S)
        if not self.url and self._error is None:
            self._error = TimeoutError(f"it did not start within {START_S:g} s")
        if self._error is not None:
            raise CommandError(
                f"the page can't be served at port {port}: {self._error}.", fix="another port: --view PORT."
            ) from None

    def offer(self, frame: rdmaxfer.Frame) -> None:
        """Show this frame, if somebody waits for one; now and then one is kept for who comes later. It may be released then."""
        loop, now_s = self._loop, time.monotonic()
        if loop is None or not (self._wanted.is_set() or now_s - self._kept_s >= KEEP_EVERY_S):
            return
        self._wanted.clear()
        self._kept_s = now_s
        about = describe(frame)
        plane = picture.thinned(frame.array, about["pixel_format"])
        with contextlib.suppress(RuntimeError):  # the loop has just ended
            asyncio.run_coroutine_threadsafe(self._show(about, plane), loop)

    def close(self) -> None:
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stop.set)
        self._thread.join(START_S)

    # --- on the thread of the server ------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._loop = None
            self._started.set()

    async def _serve(self) -> None:
        from aiohttp import web

        self._stop, self._fresh = asyncio.Event(), asyncio.Condition()

        @web.middleware
        async def only_from_here(request: web.Request, handler: Handler) -> web.StreamResponse:
            host = request.host.rpartition(":")[0] if not request.host.endswith("]") else request.host
            origin = request.headers.get("Origin")
            if host not in HERE or (origin is not None and origin != f"http://{request.host}"):
                raise web.HTTPForbidden(text="this page is for browsers on this machine\n")
            return await handler(request)

        app = web.Application(middlewares=[only_from_here])
        app.router.add_get("/", self._page)
        app.router.add_get("/live", self._live)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", self._port)
            await site.start()
            address = runner.addresses[0]
            self.url = f"http://127.0.0.1:{address[1]}/"
            self._loop = asyncio.get_running_loop()
            self._started.set()
            await self._stop.wait()
        finally:
            await runner.cleanup()

    async def _page(self, _: web.Request) -> web.StreamResponse:
        from aiohttp import web

        text = resources.files("rdmaxfer.cli.view").joinpath("page.html").read_text(encoding="utf-8")
        return web.Response(
            text=text,
            content_type="text/html",
            headers={
                "Content-Security-Policy": "default-src 'none'; img-src blob:; connect-src 'self'; "
                "script-src 'unsafe-inline'; style-src 'unsafe-inline'",
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-store",
            },
        )

    async def _live(self, request: web.Request) -> web.StreamResponse:
        """Numbers at all times; a picture (what it is, then its file) whenever the page says that it is ready for one."""
        from aiohttp import WSMsgType, web

        socket = web.WebSocketResponse(heartbeat=10.0, max_msg_size=4096)
        await socket.prepare(request)
        numbers = asyncio.create_task(self._tell_numbers(socket))
        pictures: asyncio.Task[None] | None = None
        told: list[Any] = [None]
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT and message.data == "next" and (pictures is None or pictures.done()):
                    pictures = asyncio.create_task(self._tell_picture(socket, told))
        finally:
            for task in (numbers, pictures):
                if task is not None:
                    task.cancel()
        return socket

    async def _tell_numbers(self, socket: web.WebSocketResponse) -> None:
        with contextlib.suppress(ConnectionError):
            while not socket.closed:
                # Its lock may be held for a moment: not on the event loop.
                numbers = await asyncio.to_thread(self._numbers)
                await socket.send_str(json.dumps({"numbers": numbers}))
                await asyncio.sleep(EVERY_S)

    def _numbers(self) -> dict[str, Any]:
        receiver = self._receiver
        links = receiver.links()
        return {
            "at_s": time.time(),
            "slots": receiver.slots * max(1, len(links)),
            "links": [dataclasses.asdict(link) for link in links[:20]],
            **dataclasses.asdict(receiver.statistics()),
        }

    async def _tell_picture(self, socket: web.WebSocketResponse, told: list[Any]) -> None:
        """A picture that this page has not been told; at first perhaps an older one, as no other may ever come."""
        assert self._fresh is not None
        async with self._fresh:
            self._wanted.set()
            await self._fresh.wait_for(lambda: self._latest is not told[0])
            latest = told[0] = self._latest
        assert latest is not None
        about, plane = latest
        data, kind = await asyncio.to_thread(picture.encoded, plane)
        with contextlib.suppress(ConnectionError):
            await socket.send_str(json.dumps({"frame": {**about, "type": kind}}))
            await socket.send_bytes(data)

    async def _show(self, about: dict[str, Any], plane: Any) -> None:
        assert self._fresh is not None
        async with self._fresh:
            self._latest = (about, plane)
            self._fresh.notify_all()


def describe(frame: rdmaxfer.Frame) -> dict[str, Any]:
    """What the page says of a frame."""
    try:
        metadata = json.dumps(frame.metadata, default=repr, ensure_ascii=False)
        pixel_format = str(frame.metadata.get("pixel_format", ""))[:40]
    except (rdmaxfer.RdmaxferError, ValueError, RecursionError) as error:
        metadata, pixel_format = str(error), ""
    return {
        "seq": frame.seq,
        "shape": list(frame.shape),
        "dtype": str(frame.dtype),
        "peer": frame.peer,
        "metadata": metadata[:MAX_METADATA_CHARS],
        "pixel_format": pixel_format,
        "time_s": (frame.captured_ns or frame.pushed_ns) / 1e9,
    }


__all__ = ["Viewer"]
