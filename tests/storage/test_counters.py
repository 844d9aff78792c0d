"""Counters in a mapped file: what is stored is what another process reads, whatever happens to the writer."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from storage.counters import HEADER_BYTES, Counters, read_counters


def test_what_is_counted_is_read(tmp_path: Path) -> None:
    counters = Counters(tmp_path / "counters", ["accepted", "ended"])
    assert read_counters(tmp_path / "counters") == {"accepted": 0, "ended": 0}
    counters.slots[1] += 2**64 - 1
    counters.slots[0] += 3
    assert read_counters(tmp_path / "counters") == {"accepted": 3, "ended": 2**64 - 1}
    counters.close()
    assert read_counters(tmp_path / "counters") == {"accepted": 3, "ended": 2**64 - 1}
    assert (tmp_path / "counters").stat().st_mode & 0o777 == 0o600


def _count_and_die(path: Path) -> None:
    counters = Counters(path, ["n"])
    for _ in range(1000):
        counters.slots[0] += 1
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_count_and_die, args=(tmp_path / "counters",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert read_counters(tmp_path / "counters") == {"n": 1000}


def test_too_many_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1000 counter names do not fit into a header of 8192 bytes"):
        Counters(tmp_path / "counters", [f"a long name {number}" for number in range(1000)])
    assert not (tmp_path / "counters").exists()


def test_a_file_that_is_there_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "counters").write_bytes(b"")
    with pytest.raises(FileExistsError):
        Counters(tmp_path / "counters", ["n"])


@pytest.mark.parametrize("size", [0, 100, HEADER_BYTES])
def test_a_disk_too_full_is_an_error_and_no_sigbus(size: int, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # a write beyond it comes back short, or with EFBIG
    try:
        with pytest.raises(OSError, match=r"No space left|File too large"):
            Counters(tmp_path / "counters", ["n"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff" * 9000,
        b"null".ljust(HEADER_BYTES) + bytes(8),
        b'{"format":"burstgate-counters","names":null}'.ljust(HEADER_BYTES),
        b'{"format":"other","names":[]}'.ljust(HEADER_BYTES),
        b'{"format":"burstgate-counters","names":["n"]}'.ljust(HEADER_BYTES) + bytes(7),  # a slot is cut
    ],
)
def test_what_is_no_counters_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "counters").write_bytes(content)
    with pytest.raises(ValueError, match="counters: not a burstgate-counters file"):
        read_counters(tmp_path / "counters")
