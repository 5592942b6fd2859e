"""Files wherever they lie: on this machine, in a zip archive, or behind any address that fsspec opens."""

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import fsspec
from fsspec.implementations.zip import ZipFileSystem

_IGNORED_NAMES = ("__MACOSX", "__pycache__")
_RESULTS_MARK = "evaluation.json"  # what every evaluation writes first into its folder
_RESULTS = ("evaluation.json", "per_image.parquet", "examples.png", "curves.png", "partial/")


def is_address(name: str) -> bool:
    """Whether a name is an address for fsspec, such as `hf://datasets/...`, and no path on this machine."""
    return "://" in name


@lru_cache(maxsize=8)
def _archive(path: str, process: int) -> ZipFileSystem:
    """An open zip archive; each process has its own, for two that share a file would move each other's place in it."""
    return ZipFileSystem(fo=path)


def read_bytes(path: str) -> bytes:
    """The contents of a file on this machine, in an archive (`zip://FILE::ARCHIVE`), or at an address.

    Raises:
        OSError: where it cannot be read.
    """
    if not is_address(path):
        with open(path, "rb") as file:
            return file.read()
    if path.startswith("zip://"):
        inner, _, container = path.removeprefix("zip://").rpartition("::")
        try:
            return _archive(container, os.getpid()).cat_file(inner)
        except KeyError:
            raise FileNotFoundError(f"{inner} is not in {container}") from None
    with fsspec.open(path, "rb") as file:
        return file.read()


def file_name(path: str) -> str:
    """The last part of a path, also of one in an archive."""
    path = path.removeprefix("zip://").rpartition("::")[0] if path.startswith("zip://") else path
    return posixpath.basename(path.replace(os.sep, "/"))


def stamp(path: str) -> str:
    """Size and time of a file, which change when it does; empty where nobody tells them."""
    try:
        if not is_address(path):
            found = os.stat(path)
            return f"{found.st_size}:{found.st_mtime_ns}"
        if path.startswith("zip://"):
            return stamp(path.rpartition("::")[2])
        fs, inner = fsspec.core.url_to_fs(path)
        return str(fs.ukey(inner))
    except (OSError, NotImplementedError, ValueError):
        return ""


@dataclass(frozen=True)
class FileTree:
    """A folder or a zip archive.

    Args:
        root: path or address of it, without a slash at the end.
    """

    root: str

    def path(self, relative: str) -> str:
        """Where a file of it is, as `read_bytes` takes it."""
        if self.root.endswith(".zip"):
            return f"zip://{relative}::{self.root}"
        return f"{self.root}/{relative}" if is_address(self.root) else os.path.join(self.root, relative)

    def files(self) -> tuple[list[str], list[str]]:
        """Paths of its files, relative and sorted, and those of links that lead nowhere.

        Hidden files and the results of an evaluation are left out. Links to folders are followed.

        Raises:
            OSError: where it cannot be listed.
        """
        found, dangling = [], []
        for relative, exists in self._local() if not self._is_remote() else self._remote():
            parts = relative.split("/")
            if not any(part.startswith(".") or part in _IGNORED_NAMES for part in parts):
                (found if exists else dangling).append(relative)
        marks = {posixpath.dirname(path) for path in found if posixpath.basename(path) == _RESULTS_MARK}
        results = tuple(f"{folder}/" for folder in marks if folder) + (_RESULTS if "" in marks else ())
        return sorted(path for path in found if not path.startswith(results)), sorted(dangling)

    def _is_remote(self) -> bool:
        return is_address(self.root) or self.root.endswith(".zip")

    def _remote(self) -> Iterator[tuple[str, bool]]:
        if self.root.endswith(".zip"):
            fs, inner = _archive(self.root, os.getpid()), ""
        else:
            fs, inner = fsspec.core.url_to_fs(self.root)
        inner = inner.rstrip("/")
        for path in fs.find(inner):
            yield path.removeprefix(inner).lstrip("/"), True

    def _local(self, folder: str = "") -> Iterator[tuple[str, bool]]:
        with os.scandir(os.path.join(self.root, folder)) as entries:
            for entry in entries:
                relative = f"{folder}/{entry.name}" if folder else entry.name
                if not entry.is_dir():
                    yield relative, not entry.is_symlink() or os.path.exists(entry.path)
                elif not entry.is_symlink() or not _leads_upwards(entry.path):
                    yield from self._local(relative)


def _leads_upwards(link: str) -> bool:
    """Whether a link leads to a folder that it lies in, which would never end."""
    return (os.path.realpath(os.path.dirname(link)) + os.sep).startswith(os.path.realpath(link) + os.sep)
