"""Transformers' own tests for its models, from the source distribution of the installed version."""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import pytest
import transformers

STAND_INS = Path(__file__).parent / "stand_ins"
PACKAGE = "transformers_common_tests"


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "castream" / f"transformers-{transformers.__version__}-tests"


def _download(folder: Path) -> None:
    """Put the test files of the installed version into `folder`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        requirement = f"transformers=={transformers.__version__}"
        command = ["-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", scratch, requirement]
        subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        tests = archive.with_name(archive.name.removesuffix(".tar.gz")) / "tests"
        (tests / "__init__.py").touch()  # test_configuration_common runs it
        os.replace(tests, folder)


def import_common_tests(name: str) -> types.ModuleType:
    """Import one of transformers' test modules, such as `test_modeling_common`.

    Where their source cannot be downloaded, the importing module skips and says so. The source distribution leaves out
    the sub-folders of `tests`; what its files import from there is in `stand_ins`.
    """
    os.environ.setdefault("RUN_SLOW", "1")  # leave out none that this machine can run
    if PACKAGE not in sys.modules:
        folder = _cache_folder()
        if not folder.is_dir():
            try:
                _download(folder)
            except (subprocess.CalledProcessError, OSError) as error:
                said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
                wanted = f"the source of transformers {transformers.__version__}, which holds its tests"
                pytest.skip(f"{wanted}, cannot be downloaded: {said}", allow_module_level=True)
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(STAND_INS), str(folder)]
        sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{name}")
