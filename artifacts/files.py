"""Writing files that are whole or absent, whatever happens meanwhile."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

PARTIAL = ".partial"  # suffix of what is being written; anything that bears it at the start of a run is a dead run's


def cache_folder() -> Path:
    """Where things that can be made again are kept: `$CASTREAM_CACHE`, or else `~/.cache/castream`."""
    return Path(os.environ.get("CASTREAM_CACHE") or Path.home() / ".cache" / "castream").expanduser()


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name `final` when it is complete and not before; an older one is replaced.

    Raises:
        OSError: where it cannot be written (no space left, no permission), naming it; nothing is left behind.
    """
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        mode = partial.stat().st_mode & 0o666  # what the umask leaves a file; safetensors writes its own as 0600
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                path.chmod(mode)
                _flush(path)
        old = final.with_name(final.name + ".old" + PARTIAL)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
        os.replace(partial, final)
        _flush(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        raise _explain(error, final) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(folder: str | Path) -> None:
    """Refuse a folder to write that something is in.

    Raises:
        ValueError: where it exists and is not an empty folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: name another one.")


@contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """A path to write, which gets its name `final` when it is complete and not before; an older file is replaced.

    Raises:
        OSError: where it cannot be written, naming it; nothing is left behind.
    """
    partial = final.with_name(final.name + PARTIAL)
    try:
        yield partial
        _flush(partial)
        os.replace(partial, final)
    except Exception as error:
        raise _explain(error, final) from error
    finally:
        with suppress(OSError):  # gone already, or there is no such folder
            partial.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: where it cannot be written, naming it.
    """
    with new_file(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, value) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        ValueError: on NaN or infinity, which JSON does not have.
    """
    write_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, missing_ok: bool = False) -> dict | None:
    """The object that a JSON file holds; None where there is no file and that is no matter.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: naming the file that is not a JSON object.
    """
    if missing_ok and not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): make it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected an object: make it again.")
    return content


def remove_partial(folder: Path) -> None:
    """Remove what a dead run was writing below a folder; put an older folder back that it was replacing."""
    for path in sorted(folder.rglob(f"*{PARTIAL}")):
        if path.name.endswith(f".old{PARTIAL}"):
            final = path.with_name(path.name.removesuffix(f".old{PARTIAL}"))
            if not final.exists():
                os.replace(path, final)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def torch_bytes(value) -> bytes:
    """What torch.save writes, in memory: written to disk by ourselves, a full disk is an OSError and says so."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def sha256(path: Path) -> str:
    """Checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Have a file's contents, or a folder's list of names, on the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: Exception, path: Path) -> Exception:
    """An I/O error as an OSError that names the file; safetensors and torch wrap theirs in kinds of their own."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    wrapped = type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in text
    if not isinstance(error, OSError) and not (wrapped and ("os error" in text or "failed writing" in text)):
        return error
    reason = getattr(error, "strerror", None) or text
    return OSError(f"cannot write {path}: {reason}; free some space there, or choose another folder")
