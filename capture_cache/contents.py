"""The files of a stored entry, read and checked by threads while somebody already uses the first.

    reader threads   open ─► read ─► size, sha256 ─► next file
    who wants one    waits until that one has been checked

So nothing unchecked is ever handed out, and a load need not wait for files that its first step does
not use; `finish` waits for all of them. Hashing is most of the time, and gives up Python's lock.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from capture_cache.files import open_folder, read_file
from capture_cache.manifest import FileRecord

_THREADS = 2  # more would only wait for Python's lock
_SERIAL_BYTES = 4 << 20  # less than that is not worth a second thread


class Contents(Mapping[str, bytes]):
    """Contents by name, in the record's order.

    Args:
        fd: handle of the entry's directory; the caller may close it afterwards.
        records: what each file must be.
        shown: the directory, for messages.
        first: names of files that are wanted before the others.

    Reading begins when the first file is asked for.
    """

    def __init__(
        self, fd: int, records: Mapping[str, FileRecord], shown: Path, first: Iterable[str] = ()
    ) -> None:
        self._records, self._shown = records, shown
        self._found: dict[str, bytes | Exception] = {}
        self._change = threading.Condition()
        self._folders = {"": os.dup(fd)}
        self._stop = False
        before = [name for name in first if name in records]
        rest = sorted(records.keys() - set(before), key=lambda n: records[n].nbytes)
        self._left = deque([*before, *rest])
        self._threads: list[threading.Thread] = []

    def _start(self) -> None:
        """Begin to read, once."""
        with self._change:
            if self._threads or self._stop:
                return
            large = sum(r.nbytes for r in self._records.values()) > _SERIAL_BYTES
            self._threads = [
                threading.Thread(target=self._run, name="lockstep-read", daemon=True)
                for _ in range(_THREADS if large else 1)
            ]
            for thread in self._threads:
                thread.start()

    def __getitem__(self, name: str) -> bytes:
        """Raises KeyError: no such file; CorruptBundle: it is not what its record says."""
        if name not in self._records:
            raise KeyError(name)
        self._start()
        with self._change:
            self._change.wait_for(lambda: name in self._found or self._stop)
        found = self._found.get(name)
        if isinstance(found, Exception):
            raise found
        if found is None:
            raise RuntimeError(f"{self._shown / name}: the reading has been given up")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def finish(self) -> None:
        """Wait until every file has been checked; raises the first failure, a CorruptBundle."""
        self._start()
        for thread in self._threads:
            thread.join()
        self.close()
        for found in list(self._found.values()):
            if isinstance(found, Exception):
                raise found
        if len(self._found) < len(self._records):
            raise RuntimeError(f"{self._shown}: the reading has been given up")

    def close(self) -> None:
        """Give up what has not been read. Idempotent."""
        with self._change:
            self._left.clear()
            threads = self._threads  # all of them started: that is done under this lock
        for thread in threads:
            thread.join()
        with self._change:
            self._stop = True
            self._change.notify_all()
        while self._folders:
            os.close(self._folders.popitem()[1])

    def _run(self) -> None:
        while True:
            try:
                name = self._left.popleft()
            except IndexError:
                return
            try:
                found: bytes | Exception = self._read(name)
            except Exception as e:  # told to who wants that file, and by `finish`
                found = e
            with self._change:
                self._found[name] = found
                self._change.notify_all()

    def _read(self, name: str) -> bytes:
        record = self._records[name]
        folder, _, last = name.rpartition("/")
        at = self._shown / folder if folder else self._shown
        data = read_file(self._folder(folder), last, at, max(record.nbytes, 0))
        record.check(data, self._shown / name)
        return data

    def _folder(self, name: str) -> int:
        """A handle of a folder of the entry; opened and checked once."""
        with self._change:
            fd = self._folders.get(name)
            if fd is None:
                fd = open_folder(self._folders[""], name, self._shown)
                self._folders[name] = fd
        return fd
