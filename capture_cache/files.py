"""File operations of the store: durable writes, and reads that trust nothing.

Reads go through directory handles and follow no link, so what was checked is what is read. Writes
are methods of `Files`, so that a test can make any one of them fail.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from capture_cache.errors import CorruptBundle, StoreError

# Non-blocking: a pipe planted in the place of a file must not hang its reader.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)  # of a rename
_STALE_S = 24 * 3600
REMEDY = "delete it; it will be made again"


class Files:
    """What a writer does to the disk, each call durable on return."""

    def make_dir(self, path: Path) -> None:
        os.mkdir(path, 0o755)

    def write(self, path: Path, data: bytes) -> None:
        """Create `path`, which must not exist, and force it to the disk."""
        fd = os.open(path, _CREATE, 0o644)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)

    def allocate(self, path: Path, nbytes: int) -> None:
        """Create `path`, which must not exist, with `nbytes` of zeros that the disk has room for.

        What is written into it later needs `sync_file`; through a mapping, too, it cannot fail for
        lack of space.
        """
        fd = os.open(path, _CREATE & ~os.O_WRONLY | os.O_RDWR, 0o644)
        try:
            os.posix_fallocate(fd, 0, nbytes)
        finally:
            os.close(fd)

    def sync_file(self, path: Path) -> None:
        """Force a file's contents to the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def sync_dir(self, path: Path) -> None:
        """Force a directory's own entries (new names, renames) to the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def remove(self, path: Path) -> None:
        """Remove a file, a link or a tree."""
        if path.is_dir() and not path.is_symlink():
            import shutil  # brings compressors with it, which a reader does not need

            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def open_dir(root: Path, parts: tuple[str, ...], *, entry: bool = True) -> Iterator[int | None]:
    """A handle of root/parts…, every directory on the way checked; None where it does not exist.

    Args:
        entry: the last part is an entry of the store, not one of its own directories.

    Raises:
        CorruptBundle: the entry is not a directory of ours.
        StoreError: a directory above it is unsafe or unreadable.
    """
    fds: list[int] = []
    try:
        missing = False
        for depth in range(len(parts) + 1):
            # The root itself may be given through a link; what lies in it may not.
            name, flags = (
                (str(root), _READ & ~os.O_NOFOLLOW) if depth == 0 else (parts[depth - 1], _READ)
            )
            try:
                fds.append(os.open(name, flags | os.O_DIRECTORY, dir_fd=fds[-1] if fds else None))
                problem = unsafe(os.fstat(fds[-1]))
            except FileNotFoundError:
                missing = True
                break
            except OSError as e:
                problem = _read_problem(e)
            at = root.joinpath(*parts[:depth])
            if problem is not None and entry and depth == len(parts):
                raise CorruptBundle(f"{at}: expected a directory of ours, {problem}; {REMEDY}")
            if problem is not None:
                mend = "" if _is_other(at) else "make it yours (chown, chmod o-w) or "
                raise StoreError(
                    f"store directory {at}: {problem}; {mend}give another with --store"
                )
        yield None if missing else fds[-1]
    finally:
        for fd in fds:
            os.close(fd)


def _is_other(path: Path) -> bool:
    """Whether it is something that no change of owner or mode makes a directory."""
    return os.path.lexists(path) and not path.is_dir()


def open_folder(dir_fd: int, name: str, shown: Path) -> int:
    """A handle of a directory of ours in another; `name` is one part, and no link.

    Raises:
        CorruptBundle: it is missing, not a directory, not ours or world-writable.
    """
    try:
        fd = os.open(name, _READ | os.O_DIRECTORY, dir_fd=dir_fd)
    except OSError as e:
        raise _unreadable(e, shown / name) from e
    try:
        _require_safe(os.fstat(fd), shown / name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_file(dir_fd: int, name: str, shown: Path, max_bytes: int) -> bytes:
    """Read a regular file of ours; `name` is one part, and no link.

    Raises:
        CorruptBundle: missing, not a regular file, not ours, world-writable, or above `max_bytes`.
    """
    fd = -1
    try:
        fd = os.open(name, _READ, dir_fd=dir_fd)
        info = os.fstat(fd)
        _require_safe(info, shown / name)
        if not stat.S_ISREG(info.st_mode):
            raise CorruptBundle(f"{shown / name}: expected a regular file, got another; {REMEDY}")
        if info.st_size > max_bytes:
            raise CorruptBundle(
                f"{shown / name}: expected at most {max_bytes} bytes, got {info.st_size}; {REMEDY}"
            )
        data = os.read(fd, info.st_size)
        while len(data) < info.st_size and (more := os.read(fd, info.st_size - len(data))):
            data += more
        return data
    except OSError as e:
        raise _unreadable(e, shown / name) from e
    finally:
        if fd >= 0:
            os.close(fd)


def write_failure(e: OSError, path: Path, option: str) -> StoreError:
    """What to raise for a failed write, with the remedy.

    Args:
        option: of the command, where another directory can be given.
    """
    remedies = {
        errno.ENOSPC: f"free space, or give another directory with {option}",
        errno.EDQUOT: f"free quota, or give another directory with {option}",
        errno.EACCES: f"make it writable, or give another directory with {option}",
        errno.EPERM: f"make it writable, or give another directory with {option}",
        errno.ENOTDIR: f"a file is in the way: give another directory with {option}",
        errno.EEXIST: f"a file is in the way: give another directory with {option}",
        errno.EROFS: f"it is read-only: give another directory with {option}",
    }
    remedy = remedies.get(e.errno or 0, f"check the file system, or give another {option}")
    where = f" ({e.filename})" if e.filename is not None else ""  # none: while writing to it
    return StoreError(f"cannot write {path}: {e.strerror}{where}; {remedy}")


def sweep(folder: Path, files: Files) -> None:
    """Remove what writers that died left in `folder` more than a day ago."""
    oldest = time.time() - _STALE_S
    for path in folder.glob(".tmp-*"):
        # Another sweeper was quicker, or another user's: not ours to judge.
        with contextlib.suppress(OSError):
            info = path.lstat()
            if info.st_mtime < oldest and unsafe(info) is None:
                files.remove(path)


def unsafe(info: os.stat_result) -> str | None:
    """Why someone else could have written this, or None."""
    if info.st_uid not in (os.geteuid(), 0):
        return f"expected owner {os.geteuid()} or 0, got {info.st_uid}"
    if info.st_mode & stat.S_IWOTH:
        return f"expected a mode that not everyone may write, got {stat.S_IMODE(info.st_mode):#o}"
    return None


def _require_safe(info: os.stat_result, shown: Path) -> None:
    problem = unsafe(info)
    if problem is not None:
        raise CorruptBundle(f"{shown}: {problem}; {REMEDY}")


def _unreadable(e: OSError, shown: Path) -> CorruptBundle:
    return CorruptBundle(f"{shown}: expected a readable file, {_read_problem(e)}; {REMEDY}")


def _read_problem(e: OSError) -> str:
    named = {
        errno.ELOOP: "got a symbolic link",
        errno.ENOTDIR: "got something that is not a directory",
        errno.ENXIO: "got a pipe or socket",
    }
    return named.get(e.errno or 0, f"got {e.strerror}")
