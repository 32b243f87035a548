"""Hashes of weights files: computed once, and anew whenever a file has changed."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from foundation import hashing
from foundation.hashing import cache_folder, file_sha256, files_sha256


@pytest.fixture
def old_file(tmp_path, monkeypatch) -> Path:
    """A file, in a world two seconds later and with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"first")
    later(monkeypatch)
    return file


def later(monkeypatch, seconds: float = 3.0) -> None:
    now = time.time_ns
    monkeypatch.setattr(hashing.time, "time_ns", lambda: now() + int(seconds * 1e9))


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The paths that are opened to be hashed."""
    opened: list[str] = []

    class Counting:
        def __call__(self, path, mode="r", **options):
            if mode == "rb":
                opened.append(str(path))
            return open(path, mode, **options)

    monkeypatch.setattr(hashing, "open", Counting(), raising=False)
    return opened


def test_a_file_is_hashed_once(old_file, reads):
    expected = hashlib.sha256(b"first").hexdigest()
    assert file_sha256(old_file) == file_sha256(str(old_file)) == expected
    assert reads == [str(old_file)]


def test_changed_content_of_equal_size_is_noticed_by_its_time(old_file):
    file_sha256(old_file)
    old_file.write_bytes(b"other")
    assert file_sha256(old_file) == hashlib.sha256(b"other").hexdigest()


def test_a_restored_modification_time_does_not_hide_a_change(old_file):
    """The inode's change time tells, which no program can set."""
    file_sha256(old_file)
    times = old_file.stat()
    old_file.write_bytes(b"other")
    os.utime(old_file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_sha256(old_file) == hashlib.sha256(b"other").hexdigest()


def test_a_file_that_replaces_another_is_noticed_by_its_inode(old_file, tmp_path):
    file_sha256(old_file)
    other = tmp_path / "other"
    other.write_bytes(b"other")
    os.utime(other, ns=(old_file.stat().st_atime_ns, old_file.stat().st_mtime_ns))
    os.replace(other, old_file)
    assert file_sha256(old_file) == hashlib.sha256(b"other").hexdigest()


def test_a_file_that_was_just_written_is_not_cached(tmp_path, monkeypatch, reads):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "new"
    file.write_bytes(b"x")
    assert file_sha256(file) == file_sha256(file)
    assert len(reads) == 2 and not cache_folder().exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sha256": "abc"}', '{"files": [], "sha256": "' + "0" * 64 + '"}'])
def test_a_damaged_cache_entry_is_ignored_and_repaired(old_file, content):
    expected = file_sha256(old_file)
    (entry,) = cache_folder().iterdir()
    entry.write_text(content)
    assert file_sha256(old_file) == expected
    assert json.loads(entry.read_text())["sha256"] == expected


def test_an_entry_with_a_malformed_hash_is_ignored(old_file):
    expected = file_sha256(old_file)
    (entry,) = cache_folder().iterdir()
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "sha256": "z" * 64}))
    assert file_sha256(old_file) == expected


def test_a_cache_that_cannot_be_written_is_left_out(old_file, tmp_path, monkeypatch):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert file_sha256(old_file) == hashlib.sha256(b"first").hexdigest()


def test_several_files_are_hashed_one_after_the_other(old_file, tmp_path, reads):
    second = tmp_path / "second"
    second.write_bytes(b"second")
    expected = hashlib.sha256(b"firstsecond").hexdigest()
    assert files_sha256([old_file, second]) == files_sha256([old_file, second]) == expected
    assert len(reads) == 2
    second.write_bytes(b"SECOND")
    assert files_sha256([old_file, second]) == hashlib.sha256(b"firstSECOND").hexdigest()


def test_a_missing_file_is_an_os_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        file_sha256(tmp_path / "none")
    assert error.value.filename == str(tmp_path / "none") or error.value.filename == tmp_path / "none"


def test_temporary_files_do_not_stay(old_file):
    file_sha256(old_file)
    assert [path.suffix for path in cache_folder().iterdir()] == [".json"]
    assert not any(path.name.startswith(".") for path in cache_folder().iterdir())


def test_without_a_home_folder_files_are_hashed_each_time(old_file, reads, monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    expected = hashlib.sha256(b"first").hexdigest()
    assert [file_sha256(old_file), file_sha256(old_file)] == [expected, expected]
    assert len(reads) == 2
