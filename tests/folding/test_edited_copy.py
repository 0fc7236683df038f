"""Edited copies: every byte in its place, whatever the pieces, and no more memory than two changed stretches."""

import errno
import io
import itertools
import os
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from melora_fx import MELoRAError
from melora_fx.folding import edited_copy
from melora_fx.folding.edited_copy import Stretch, write_edited

SIZES = {"a": 301, "b": 97}
"""The sizes of the two sources: odd on purpose."""
Plan = tuple[str, int, int]
"""(kind, start, length) of a piece: "a" and "b" are kept stretches of that source, "A" and "B" changed ones, "bytes"
new bytes."""


def invert(data: memoryview) -> None:
    """Changes every byte, depending on its position in the stretch."""
    for i in range(len(data)):
        data[i] ^= 255 - i % 16


def make_sources(folder: Path, sizes: dict[str, int] = SIZES) -> dict[str, bytes]:
    """Writes files `a` and `b` of random bytes, and returns their content."""
    generator = torch.Generator().manual_seed(0)
    content = {
        name: torch.randint(256, (size,), generator=generator).to(torch.uint8).numpy().tobytes()
        for name, size in sizes.items()
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return content


def make_pieces(folder: Path, content: dict[str, bytes], plans: list[Plan]) -> tuple[list[Stretch | bytes], bytes]:
    """Returns the pieces of a plan, and the bytes of the file that they must produce."""
    pieces: list[Stretch | bytes] = []
    expected = b""
    for kind, start, length in plans:
        if kind == "bytes":
            pieces.append(bytes([start % 256]) * length)
            expected += bytes([start % 256]) * length
            continue
        is_changed = kind.isupper()
        data = bytearray(content[kind.lower()][start : start + length])
        if is_changed:
            invert(memoryview(data))
        pieces.append(Stretch(folder / kind.lower(), start, start + len(data), invert if is_changed else None))
        expected += data
    return pieces, expected


def written(folder: Path, pieces: list[Stretch | bytes]) -> bytes:
    """Returns the bytes written from the pieces; `advance` must be called with the same number of bytes in total."""
    told: list[int] = []
    write_edited({folder / "out": pieces}, told.append)
    data = (folder / "out").read_bytes()
    assert sum(told) == len(data)
    return data


@pytest.fixture(params=["sendfile", "no_sendfile"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without os.sendfile, which not every system has."""
    if request.param == "no_sendfile":
        monkeypatch.delattr(os, "sendfile", raising=False)
    return request.param


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes steps so small that a few bytes need several copies and writes."""
    monkeypatch.setattr(edited_copy, "_COPY_BYTES", 13)
    monkeypatch.setattr(edited_copy, "_WRITE_BYTES", 7)


@pytest.mark.default_cases("sendfile")
@pytest.mark.usefixtures("platform", "small_steps")
def test_pieces_in_every_order(tmp_path: Path) -> None:
    """Kept, changed, changed again, new and empty ones, also a changed one after a kept one of the same file."""
    content = make_sources(tmp_path)
    plans: list[Plan] = [("a", 3, 50), ("A", 100, 61), ("B", 0, 97), ("bytes", 7, 33), ("A", 40, 0), ("b", 9, 0)]
    for order in itertools.permutations(plans):
        pieces, expected = make_pieces(tmp_path, content, list(order))
        assert written(tmp_path, pieces) == expected, order


@st.composite
def plans(draw: st.DrawFn) -> list[Plan]:
    found = []
    for kind in draw(st.lists(st.sampled_from(["a", "b", "A", "B", "bytes"]), max_size=12)):
        start = draw(st.integers(0, SIZES.get(kind.lower(), 255)))
        found.append((kind, start, draw(st.integers(0, 64))))
    return found


@pytest.mark.parametrize("has_sendfile", [True, False], ids=["sendfile", "no_sendfile"])
@given(plan=plans())
def test_any_pieces(has_sendfile: bool, plan: list[Plan]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(edited_copy, "_COPY_BYTES", 13)
        patch.setattr(edited_copy, "_WRITE_BYTES", 7)
        if not has_sendfile:
            patch.delattr(os, "sendfile", raising=False)
        folder = Path(name)
        pieces, expected = make_pieces(folder, make_sources(folder), plan)
        assert written(folder, pieces) == expected


@pytest.mark.usefixtures("platform")
def test_large_changes_on_odd_sizes(tmp_path: Path) -> None:
    """Larger than one write or copy, and each size once in each of the two buffers."""
    content = make_sources(tmp_path, {"a": 20_000_003})["a"]
    sizes = [3_000_001, 1, 2_999_999, 7, 2_500_000, 4_000_003]
    pieces: list[Stretch | bytes] = []
    expected = bytearray()
    start = 1

    def flip(data: memoryview) -> None:
        torch.frombuffer(data, dtype=torch.uint8).bitwise_xor_(255)

    for size in sizes:
        pieces.append(Stretch(tmp_path / "a", start, start + size, flip))
        expected += bytes(255 - byte for byte in content[start : start + size])
        start += size
    pieces.append(Stretch(tmp_path / "a", 0, len(content)))
    assert written(tmp_path, pieces) == expected + content


def test_a_change_may_take_its_bytes_for_wider_numbers_wherever_they_lie(tmp_path: Path) -> None:
    """The bytes that a change receives start at an address that is aligned for any dtype."""
    values = torch.arange(11, dtype=torch.float64)
    (tmp_path / "a").write_bytes(b"odd" + values.numpy().tobytes())

    def double(data: memoryview) -> None:
        torch.frombuffer(data, dtype=torch.float64).mul_(2)

    changed = written(tmp_path, [b"!", Stretch(tmp_path / "a", 3, 3 + 88, double)])
    assert changed == b"!" + (2 * values).numpy().tobytes()


def test_a_file_that_is_there_is_replaced_and_the_sources_stay(tmp_path: Path) -> None:
    content = make_sources(tmp_path)
    (tmp_path / "out").write_bytes(b"x" * 1000)
    pieces, expected = make_pieces(tmp_path, content, [("A", 0, 301), ("b", 0, 97)])
    assert written(tmp_path, pieces) == expected
    assert written(tmp_path, []) == b""
    assert {name: (tmp_path / name).read_bytes() for name in content} == content


@pytest.mark.usefixtures("platform", "small_steps")
def test_progress_is_told_as_it_is_made(tmp_path: Path) -> None:
    pieces, _ = make_pieces(tmp_path, make_sources(tmp_path), [("a", 0, 100), ("bytes", 1, 20), ("A", 0, 30)])
    told: list[int] = []
    write_edited({tmp_path / "out": pieces}, told.append)
    assert told == [13] * 7 + [9, 20, 30]


class RawFile(io.FileIO):
    """What `open` returns without buffering."""

    def __init__(self, path: Path, mode: str, buffering: int = 0) -> None:
        super().__init__(path, mode)


class ShortFile(RawFile):
    """Reads at most 3 bytes at once and writes 2."""

    def readinto(self, data: Any) -> int:
        return super().readinto(data[:3])

    def write(self, data: Any) -> int:
        return super().write(data[:2])


@pytest.mark.usefixtures("platform", "small_steps")
def test_short_reads_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, expected = make_pieces(
        tmp_path, make_sources(tmp_path), [("a", 5, 100), ("B", 3, 40), ("bytes", 1, 9), ("A", 0, 301)]
    )
    monkeypatch.setattr(edited_copy, "open", ShortFile, raising=False)
    if hasattr(os, "sendfile"):
        sendfile = os.sendfile
        monkeypatch.setattr(os, "sendfile", lambda out, source, start, size: sendfile(out, source, start, min(size, 5)))
    assert written(tmp_path, pieces) == expected


@pytest.mark.parametrize("code", [errno.ENOTSOCK, errno.EINVAL, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_system_whose_sendfile_does_not_take_files_copies_otherwise(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has an os.sendfile that writes only to sockets (ENOTSOCK); Linux refuses some file systems (EINVAL)."""

    def refuses(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    pieces, expected = make_pieces(tmp_path, make_sources(tmp_path), [("a", 5, 100), ("B", 3, 40), ("b", 0, 97)])
    monkeypatch.setattr(os, "sendfile", refuses, raising=False)
    assert written(tmp_path, pieces) == expected


class SlowFile(RawFile):
    """Waits between seeking a position and reading there."""

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        super().seek(position, whence)
        time.sleep(0.001)
        return position


@pytest.mark.usefixtures("platform", "small_steps")
def test_copies_and_changes_of_one_file_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that copies and the one that reads for a change use the file at the same time."""
    monkeypatch.setattr(edited_copy, "open", SlowFile, raising=False)
    plan: list[Plan] = [("A", 0, 10), ("a", 10, 90), ("A", 100, 10), ("A", 110, 10), ("a", 120, 80), ("A", 200, 10)]
    pieces, expected = make_pieces(tmp_path, make_sources(tmp_path), plan)
    assert written(tmp_path, pieces) == expected


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("kind", ["a", "A"], ids=["kept", "changed"])
@pytest.mark.parametrize("size", [0, 99, 300], ids=["empty", "before", "within"])
def test_a_source_that_was_cut_short_is_an_error(kind: str, size: int, tmp_path: Path) -> None:
    pieces, _ = make_pieces(tmp_path, make_sources(tmp_path), [("b", 0, 97), (kind, 100, 201), ("bytes", 0, 9)])
    os.truncate(tmp_path / "a", size)
    with pytest.raises(OSError, match="a ends early"):
        write_edited({tmp_path / "out": pieces}, lambda _: None)


def test_a_source_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_edited({tmp_path / "out": [Stretch(tmp_path / "a", 0, 9)]}, lambda _: None)


@pytest.mark.usefixtures("platform")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("kind", ["a", "A", "bytes"], ids=["kept", "changed", "given"])
def test_a_full_disk_is_an_error(kind: str, tmp_path: Path) -> None:
    pieces, _ = make_pieces(tmp_path, make_sources(tmp_path), [(kind, 0, 90), ("b", 0, 97), ("A", 0, 9), ("B", 0, 9)])
    with pytest.raises(OSError, match=r"No space left|Invalid argument"):  # the latter if sendfile refuses devices
        write_edited({Path("/dev/full"): pieces}, lambda _: None)


@pytest.mark.parametrize("error", [MELoRAError("beyond the range"), KeyboardInterrupt()], ids=["refusal", "ctrl_c"])
def test_what_a_change_raises_comes_through_and_no_thread_stays(error: BaseException, tmp_path: Path) -> None:
    make_sources(tmp_path)

    def fails(_: memoryview) -> None:
        raise error

    threads = threading.active_count()
    with pytest.raises(type(error)) as caught:
        write_edited(
            {tmp_path / "out": [Stretch(tmp_path / "a", 0, 99), Stretch(tmp_path / "a", 99, 200, fails)]},
            lambda _: None,
        )
    assert caught.value is error
    assert threading.active_count() == threads


@pytest.mark.skipif(not hasattr(os, "sendfile"), reason="without os.sendfile a copy needs memory")
def test_memory_is_that_of_three_of_the_largest_changed_stretches(tmp_path: Path) -> None:
    size = 1 << 20
    (tmp_path / "a").write_bytes(bytes(12 * size))
    pieces: list[Stretch | bytes] = [
        Stretch(tmp_path / "a", i * size, (i + 1) * size, lambda data: None) for i in range(8)
    ]
    pieces.append(Stretch(tmp_path / "a", 8 * size, 12 * size))
    tracemalloc.start()
    try:
        write_edited({tmp_path / "out": pieces}, lambda _: None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 3 * size <= peak < 3.2 * size
    assert (tmp_path / "out").read_bytes() == bytes(12 * size)
