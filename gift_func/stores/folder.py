"""A folder of adapter files: the file of each name, and stamps that show whether a file has changed."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator

from ..errors import AdaptError, FileError, nearest

Stamp = tuple[int, int, int, int]


class Folder:
    """The files of a folder by name: the file of a name is the pattern with its `*` replaced by the name.

    Args:
        root: the folder.
        pattern: a path in the folder, with one `*`.

    Raises:
        FileError: if there is no such folder.
        ValueError: if the pattern has not one `*`, or leads out of the folder.
    """

    def __init__(self, root: str | os.PathLike[str], pattern: str) -> None:
        self._before, star, self._after = pattern.partition("*")
        if not star or "*" in self._after or _refusal(self._before + "a" + self._after):
            raise ValueError(f"a pattern is a path in the folder with one '*', for the adapter's name, got {pattern!r}")
        if not os.path.isdir(root):
            raise FileError(f"there is no folder {os.fspath(root)}")
        self._root = os.path.abspath(root)

    def path(self, name: object) -> str:
        """The path of a name's file, which need not exist.

        Raises:
            AdaptError: if it leads out of the folder, or is no name.
        """
        reason = _refusal(name)
        if reason is not None:
            raise AdaptError(f"{name!r} names no adapter of a store: {reason}")
        return f"{self._root}/{self._before}{name}{self._after}"

    def names(self) -> tuple[str, ...]:
        """The names of all present files, sorted."""
        wanted = re.compile(f"{re.escape(self._before)}(.+){re.escape(self._after)}", re.DOTALL)
        found = (wanted.fullmatch(path) for path in _files(self._root))
        return tuple(sorted(match[1] for match in found if match and not _refusal(match[1])))

    def __contains__(self, name: object) -> bool:
        return not _refusal(name) and stamp(self.path(name)) is not None

    def missing(self, name: str) -> KeyError:
        """The error for a name without a file."""
        return KeyError(f"the store has no adapter {name!r}: there is no file {self.path(name)}; {nearest(name, self.names())}")


def stamp(path: str) -> Stamp | None:
    """A value that changes if a file is written or replaced; None if there is no file.

    Raises:
        FileError: if the system does not give the file's status.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise FileError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _refusal(name: object) -> str | None:
    """Why something cannot be an adapter's name; None if it can."""
    if not isinstance(name, str) or not name:
        return "a name is a text that is not empty"
    if "\\" in name or "\0" in name or (os.name == "nt" and ":" in name):
        return "backslashes, null characters and drives are no part of one"
    steps = name.split("/")
    if ".." in steps or not steps[0]:
        return "it would lead out of the folder"
    if any(not step or step.startswith(".") for step in steps):
        return "no step of a name is empty or begins with a dot"
    return None


def _files(root: str) -> Iterator[str]:
    """The paths, relative to the folder, of all files that are not hidden; links are followed."""
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        above = waiting.pop()
        folder = os.path.join(root, above)
        try:
            found = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError:  # it was deleted, or may not be read
            continue
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        for entry in entries:
            if not entry.name.startswith("."):
                if entry.is_dir():
                    waiting.append(f"{above}{entry.name}/")
                elif entry.is_file():
                    yield above + entry.name
