"""What `rdmaxfer send` makes of its arguments, and the frames of the demo."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from rdmaxfer.cli import digest, photos, sources
from rdmaxfer.cli.failure import CommandError, Exit
from rdmaxfer.cli.sources import Files, Item, Pattern, expand, load_image, repeated
from rdmaxfer.errors import UnsupportedDtype


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.npy", "a.npy", "c.PNG", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.npy").touch()
    return tmp_path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_directory_is_what_is_in_it_sorted(folder: Path) -> None:
    assert names(expand([str(folder)])) == ["a.npy", "b.npy", "c.PNG"]


def test_a_quoted_glob_is_expanded(folder: Path) -> None:
    assert names(expand([f"{folder}/*.npy"])) == ["a.npy", "b.npy"]
    assert names(expand([f"{folder}/**/*.npy"])) == ["a.npy", "b.npy", "d.npy"]


def test_files_keep_their_order_and_a_file_may_be_named_like_a_glob(folder: Path) -> None:
    odd = folder / "[x].npy"
    odd.touch()
    assert names(expand([str(folder / "b.npy"), str(odd), str(folder / "a.npy")])) == ["b.npy", "[x].npy", "a.npy"]


@pytest.mark.parametrize("argument", ["missing.npy", "*.tiff", "notes.txt", "empty"])
def test_what_yields_nothing_is_a_usage_error(folder: Path, argument: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(CommandError) as caught:
        expand([str(folder / argument)])
    assert caught.value.code == Exit.USAGE


def test_npy_files_travel_whole_or_split(tmp_path: Path) -> None:
    stack = np.arange(24, dtype="<f4").reshape(2, 3, 4)
    np.save(tmp_path / "s.npy", stack)
    (whole,) = Files([tmp_path / "s.npy"])
    parts = list(Files([tmp_path / "s.npy"], split=True))
    assert np.array_equal(whole.array, stack)
    assert [np.array_equal(part.array, slice_) for part, slice_ in zip(parts, stack, strict=True)] == [True, True]


@pytest.mark.parametrize(
    "array", [np.zeros((0, 3)), np.float64(5), np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])]
)
def test_unusual_arrays_are_read(tmp_path: Path, array: Any) -> None:
    np.save(tmp_path / "u.npy", array)
    (item,) = Files([tmp_path / "u.npy"])
    assert np.array_equal(item.array, array)
    assert item.array.dtype == np.asarray(array).dtype


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CommandError, match=r"p\.npy"):
        list(Files([tmp_path / "p.npy"]))


def test_a_single_value_can_not_be_split(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.float64(5))
    with pytest.raises(CommandError, match="single value"):
        list(Files([tmp_path / "v.npy"], split=True))


def test_images_are_read_as_pixels(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    image.fromarray(pixels).save(tmp_path / "i.png")
    image.fromarray(pixels).convert("P").save(tmp_path / "palette.png")
    (item, palette) = Files([tmp_path / "i.png", tmp_path / "palette.png"])
    assert item.source == "image"
    assert np.array_equal(item.array, pixels)
    assert palette.array.shape == (4, 5, 3)


def test_what_is_no_image_is_told(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    (tmp_path / "i.png").write_text("no")
    with pytest.raises(CommandError, match="not an image"):
        load_image(tmp_path / "i.png")


def test_repeating_takes_from_memory_what_fits() -> None:
    class Counted:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter([Item(name, "npy", np.zeros(4)) for name in "ab"])

    for keep_bytes, passes in ((64, 1), (63, 3)):
        items = Counted()
        assert [item.name for item in repeated(items, 3, keep_bytes=keep_bytes)] == list("ababab")
        assert items.passes == passes


@pytest.mark.parametrize(
    "text", ["4x4:uint8", "3:>M8[us]", "2x3x4:complex64", "7", "0x4:float32", "5x5:bool", "1:bool"]
)
def test_all_frames_of_a_pattern_differ(text: str) -> None:
    frames = [item.array.copy() for item in Pattern.parse(text, 2)]
    assert frames[0].size == 0 or not np.array_equal(frames[0].view(np.uint8), frames[1].view(np.uint8))
    assert len({frame.shape for frame in frames}) == 1


def test_a_pattern_of_bools_holds_only_bools() -> None:
    frames = [item.array.view(np.uint8).max() for item in Pattern.parse("100:bool", 300)]
    assert max(frames) == 1


@pytest.mark.parametrize("text", ["", "x", "4x:uint8", "-1:uint8", "4 x 4:uint8", "1x1x1x1x1x1x1x1x1:uint8", ":uint8"])
def test_what_is_no_pattern_is_told(text: str) -> None:
    with pytest.raises(CommandError, match="pattern"):
        Pattern.parse(text, 1)


def test_a_pattern_has_a_dtype_that_can_travel() -> None:
    for dtype in ("object", "nonsense"):
        with pytest.raises(UnsupportedDtype):
            Pattern.parse(f"4:{dtype}", 1)


# --- hashes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3).T,
        np.zeros((0, 3)),
        np.array(5.0),
        np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "u1"), ("b", ">i8")]),
    ],
)
def test_the_hash_is_of_the_bytes_in_c_order(array: np.ndarray[Any, Any]) -> None:
    data = array.tobytes()
    assert digest.digest(array, "sha256") == hashlib.sha256(data).hexdigest()
    assert digest.digest(array, "blake2b") == hashlib.blake2b(data, digest_size=32).hexdigest()
    for algorithm in digest.ALGORITHMS:
        assert digest.check(array, {algorithm: digest.digest(array, algorithm)}) == ""


# --- the demo's frames ------------------------------------------------------------------------------------------------


def test_frames_of_a_photograph_are_tiled_and_all_different() -> None:
    generator = np.random.default_rng(1)
    images = [
        generator.integers(0, 255, (height, width, 3), np.uint8)
        for height, width in ((50, 70), (1411, 1411), (200, 1000))
    ]
    seen = set()
    for number in range(66):
        frame = np.full((300, 500, 3), 0, np.uint8)
        photos.compose(number, images, frame)
        photo = images[number % 3]
        top, left = number // 3 * 97 % photo.shape[0], number // 3 * 151 % photo.shape[1]
        rows, columns = (np.arange(300) + top) % photo.shape[0], (np.arange(500) + left) % photo.shape[1]
        assert np.array_equal(frame, photo[np.ix_(rows, columns)])
        seen.add(frame.tobytes())
    assert len(seen) == 66


def test_without_scikit_image_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"rdmaxfer\[demo\]"):
        photos.find()


# --- videos and cameras -----------------------------------------------------------------------------------------------


def film(path: Path, frames: int) -> Path:
    """A film that goes from black to white."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for number in range(frames):
        writer.write(np.full((48, 64, 3), number * 255 // frames, np.uint8))
    writer.release()
    return path


def test_a_video_is_sent_frame_by_frame(tmp_path: Path) -> None:
    path = film(tmp_path / "film.avi", 10)
    items = list(sources.Video(str(path)))
    assert [item.array.shape for item in items] == [(48, 64, 3)] * 10
    assert {(item.name, item.source, item.pixel_format) for item in items} == {("film.avi", "video", "BGR8")}
    brightness = [item.array.mean() for item in items]
    assert brightness == sorted(brightness)
    assert len(list(sources.repeated(sources.Joined([sources.Video(str(path))] * 2), 2))) == 40


@pytest.mark.parametrize(
    ("name", "says"), [("camera:99", "can't be opened as a camera"), ("film.mp4", "can't be opened as a video")]
)
def test_what_is_no_video_and_no_camera(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_text("no film")
    with pytest.raises(CommandError, match=says):
        list(sources.Video(name if ":" in name else str(tmp_path / name)))


def test_what_counts_as_a_video() -> None:
    assert all(map(sources.is_video, ("camera:0", "a/b.MP4", "x.webm")))
    assert not any(map(sources.is_video, ("camera", "camera:x", "a.npy", "a.png", "mp4")))


def test_videos_need_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(CommandError, match="need OpenCV"):
        list(sources.Video("camera:0"))
