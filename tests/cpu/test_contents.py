"""Files of an entry on demand: checked before they are handed out, all of them at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from capture_cache.contents import Contents
from capture_cache.errors import CorruptBundle
from capture_cache.manifest import FileRecord
from runtime.aside import Aside

FILES = {"program": b"p" * 900, "graph/a": b"a" * 400, "graph/b": b"b" * 500, "cubin/c": b"c" * 99}


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def opened(entry: Path, first: tuple[str, ...] = ()) -> Contents:
    fd = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return Contents(fd, {n: FileRecord.of(d) for n, d in FILES.items()}, entry, first)
    finally:
        os.close(fd)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_is_a_mapping_of_what_is_there(entry: Path) -> None:
    before = num_open_files()
    contents = opened(entry)
    assert dict(contents) == FILES
    assert list(contents) == list(FILES), "in the record's order"
    assert "graph/a" in contents
    assert "graph/z" not in contents
    assert contents.get("graph/z") is None
    contents.finish()
    contents.close()
    assert contents["program"] == FILES["program"], "what was read stays"
    assert num_open_files() == before


def test_nothing_is_read_before_something_is_asked_for(entry: Path) -> None:
    (entry / "graph/b").write_bytes(b"x" * 500)
    contents = opened(entry)
    assert all(name in contents for name in FILES)
    (entry / "graph/b").write_bytes(b"b" * 500)
    assert contents["graph/a"] == FILES["graph/a"]
    contents.finish()


def test_a_damaged_file_is_refused_to_who_asks_and_at_the_end(entry: Path) -> None:
    (entry / "graph/b").write_bytes(b"x" * 500)
    contents = opened(entry, ("program",))
    assert contents["program"] == FILES["program"], "that one is sound"
    with pytest.raises(CorruptBundle, match=r"graph/b: expected sha256 .*delete it"):
        contents["graph/b"]
    with pytest.raises(CorruptBundle, match="graph/b: expected sha256"):
        contents.finish()


def test_a_folder_that_is_a_link_is_not_followed(entry: Path) -> None:
    (entry / "graph").rename(entry / "elsewhere")
    (entry / "graph").symlink_to("elsewhere")
    contents = opened(entry)
    with pytest.raises(CorruptBundle, match="graph: expected a readable file"):
        contents["graph/a"]
    contents.close()


def test_given_up_it_leaves_nothing_open_and_nobody_waiting(entry: Path) -> None:
    before = num_open_files()
    contents = opened(entry)
    contents.close()
    contents.close()
    assert num_open_files() == before
    with pytest.raises(RuntimeError, match="the reading has been given up"):
        contents["program"]
    with pytest.raises(RuntimeError, match="the reading has been given up"):
        contents.finish()  # which would say that all is checked


def test_what_runs_aside_tells_at_the_end() -> None:
    done = []
    aside = Aside(lambda: done.append(1))
    aside.wait()
    aside.wait()
    assert done == [1]

    def fail() -> None:
        raise ValueError("no room")

    aside = Aside(fail)
    aside.close()
    with pytest.raises(ValueError, match="no room"):
        aside.wait()
