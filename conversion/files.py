"""Writing a result whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(output: str | Path) -> Iterator[Path]:
    """Hand out a temporary folder beside `output`, which takes that name once the block has ended without an error.

    Raises:
        ValueError: where `output` exists and is not an empty folder.
        OSError: where it can't be written.
    """
    output = Path(output).absolute()
    check_free(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are for their owner alone
        yield temporary
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(output: str | Path) -> None:
    """Refuse an output folder that something is in.

    Raises:
        ValueError: where `output` exists and is not an empty folder.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists and is not an empty folder: name another one.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
