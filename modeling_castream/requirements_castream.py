"""The versions that this code needs of the libraries that load it: a Hub folder comes without a package's bounds."""

import re
from importlib.metadata import PackageNotFoundError, version

# The oldest that the test suite was run with.
MINIMUM = {"torch": (2, 11), "transformers": (5, 17), "huggingface-hub": (1, 33)}


def check_versions() -> None:
    """Refuse libraries that are too old, before something of theirs that is missing ends in a traceback of its own.

    Raises:
        ImportError: naming each library, its version, and the command that mends it.
    """
    old = []
    for package, minimum in MINIMUM.items():
        try:
            found = version(package)
        except PackageNotFoundError:  # a build without metadata: nothing is known against it
            continue
        if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < minimum:
            old.append((package, ".".join(map(str, minimum)), found))
    if old:
        needed = ", ".join(f"{package} >= {minimum} (here is {found})" for package, minimum, found in old)
        command = " ".join(f"'{package}>={minimum}'" for package, minimum, _ in old)
        raise ImportError(f"This CA-Stream model needs {needed}: pip install -U {command}")


check_versions()

__all__ = ["check_versions"]
