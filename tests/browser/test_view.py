"""The page of `rdmaxfer recv --view`, in a real browser. Screenshots are kept in $RDMAXFER_SCREENSHOTS, if that is set."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from chromium import page

import rdmaxfer
from rdmaxfer.cli import main
from rdmaxfer.cli.view import Viewer

HOSTILE = "<img src=x onerror=alert(1)> & <script>alert(2)</script>"


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    path = Path(os.environ.get("RDMAXFER_SCREENSHOTS") or tmp_path)
    path.mkdir(parents=True, exist_ok=True)
    return path


class Stream:
    """A sender and a receiver of this process whose frames are shown."""

    def __init__(self) -> None:
        self.tx = rdmaxfer.Sender(fabric="shm")
        self.rx = rdmaxfer.Receiver(fabric="shm")
        self.viewer = Viewer(self.rx, 0)
        self.url = self.viewer.url
        self.tx.connect(self.rx.bind("tcp://127.0.0.1:*"))

    def close(self) -> None:
        self.tx.close()
        self.viewer.close()
        self.rx.close()

    async def show(self, array: np.ndarray[Any, Any], **metadata: Any) -> None:
        await self.tx.push_async(array, metadata=metadata)
        with await self.rx.recv_async() as frame:
            self.viewer.offer(frame)

    async def play(self, arrays: Any) -> None:
        """For ever, at the pace of a camera."""
        for array in arrays:
            await self.show(array, exposure_ms=4)
            await asyncio.sleep(1 / 60)


@pytest.fixture
def stream() -> Iterator[Stream]:
    made = Stream()
    yield made
    made.close()


def spots() -> Iterator[np.ndarray[Any, Any]]:
    """A spot that goes round, in 16 bits, with noise: what a detector sees."""
    y, x = np.mgrid[:480, :640]
    noise = np.random.default_rng(1).poisson(40, (480, 640))
    turn = 0.0
    while True:
        turn += 0.05
        spot = 3000 * np.exp(-(((x - 320 - 180 * np.cos(turn)) ** 2 + (y - 240 - 140 * np.sin(turn)) ** 2) / 900))
        yield (noise + spot).astype(np.uint16)


def test_a_live_stream(stream: Stream, shots: Path) -> None:
    async def look() -> None:
        playing = asyncio.create_task(stream.play(spots()))
        async with page() as tab:
            await tab.open(stream.url)
            first = int((await tab.until("document.getElementById('number').textContent")).split()[1])
            await tab.until(f"+document.getElementById('number').textContent.split(' ')[1] > {first} + 30")
            await tab.until("+document.getElementById('fps').textContent > 10")
            await tab.until("document.getElementById('trace').getAttribute('points').split(' ').length > 4")
            await tab.until("document.querySelector('#ages dd').textContent !== '\u2013'")
            assert await tab.value("document.getElementById('kind').textContent") == "480 \u00d7 640 uint16"
            assert "over shm" in await tab.value("document.getElementById('links').textContent")
            assert "exposure_ms" in await tab.value("document.getElementById('metadata').textContent")
            assert await tab.value("document.getElementById('picture').naturalWidth") == 640
            await tab.picture(shots / "live.png")
            await tab.value("document.getElementById('pause').click()")
            await asyncio.sleep(0.3)  # what was on its way has arrived
            paused = await tab.value("document.getElementById('number').textContent")
            await tab.until("document.getElementById('pause').textContent === 'Go on'")
            await asyncio.sleep(0.3)
            assert await tab.value("document.getElementById('number').textContent") == paused
            await tab.value("document.getElementById('pause').click()")
            await tab.until(f"document.getElementById('number').textContent !== '{paused}'")
            assert tab.problems == []
        playing.cancel()

    asyncio.run(look())


def test_colours_small_pictures_and_what_others_wrote(stream: Stream, shots: Path) -> None:
    colours = np.zeros((8, 8, 3), np.uint8)
    colours[:4, :, 2] = 255  # red, where blue comes first
    colours[4:, :, 0] = 255

    async def look() -> None:
        async with page() as tab:
            await tab.open(stream.url)
            await tab.until("document.getElementById('state').textContent === 'live'")
            await stream.show(colours, pixel_format="BGR8", note=HOSTILE)
            await tab.until("document.getElementById('number').textContent === 'frame 0'")
            assert HOSTILE in await tab.value("document.getElementById('metadata').textContent")
            draw = """(() => { const c = document.createElement('canvas'); c.width = c.height = 8; const g = c.getContext('2d');
                g.drawImage(document.getElementById('picture'), 0, 0); return [...g.getImageData(4, 1, 1, 1).data]; })()"""
            assert await tab.value(draw) == [255, 0, 0, 255]
            assert await tab.value("document.getElementById('picture').classList.contains('small')")
            await tab.picture(shots / "colours.png")
            assert tab.problems == []

    asyncio.run(look())


def test_before_the_first_frame_and_after_the_end(stream: Stream, shots: Path) -> None:
    async def look() -> None:
        async with page(700, 900) as tab:
            await tab.open(stream.url)
            await tab.until("document.getElementById('state').textContent === 'live'")
            assert not await tab.value("document.getElementById('empty').hidden")
            await tab.picture(shots / "empty.png")
            await asyncio.to_thread(stream.viewer.close)
            await tab.until("document.getElementById('state').textContent === 'the receiver has ended'")

    asyncio.run(look())


def test_a_page_that_comes_late_sees_the_latest_frame(stream: Stream) -> None:
    async def look() -> None:
        async with page() as tab:
            await tab.open(stream.url)
            await stream.show(np.zeros((4, 4)))  # before the page has asked, perhaps
            await tab.until("document.getElementById('number').textContent === 'frame 0'")
        async with page() as tab:
            await tab.open(stream.url)
            await tab.until("document.getElementById('number').textContent === 'frame 0'")

    asyncio.run(look())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
    ids=str,
)
def test_pages_of_other_sites_are_turned_away(stream: Stream, headers: dict[str, str], status: int) -> None:
    port = stream.url.rstrip("/").rpartition(":")[2]
    filled = {name: value.format(port=port) for name, value in headers.items()}

    async def ask() -> None:
        async with aiohttp.ClientSession() as session:
            async with session.get(stream.url, headers=filled) as answer:
                assert answer.status == status
                if status == 200:
                    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            if status == 200:
                async with session.ws_connect(f"{stream.url}live", headers=filled) as socket:
                    assert "numbers" in (await socket.receive_json(timeout=10))
            else:
                with pytest.raises(aiohttp.WSServerHandshakeError):
                    await session.ws_connect(f"{stream.url}live", headers=filled)

    asyncio.run(ask())


def test_a_port_that_is_taken_is_one_sentence(stream: Stream, capsys: pytest.CaptureFixture[str]) -> None:
    port = stream.url.rstrip("/").rpartition(":")[2]
    assert main(["recv", "tcp://127.0.0.1:*", "--view", port, "--fabric", "shm"]) == 1
    assert f"can't be served at port {port}" in capsys.readouterr().err
