"""Who may import whom (the rooms of the package), and what the Hub's loader can follow."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("tests", "app", "benchmarks", "docs")  # nobody imports these; they may look anywhere
ROOMS = sorted(
    path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py")) and path.name not in SCRIPTS
)
PAYLOAD = sorted((ROOT / "modeling_castream").glob("*_castream.py"))
# What the Hub payload may need on a loader's machine besides the standard library.
PAYLOAD_IMPORTS = {"torch", "transformers", "huggingface_hub", "timm", "numpy", "PIL"}


def imported(path: Path) -> list[tuple[int, str, tuple[str, ...]]]:
    """(level, module, names) of every import in a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", tuple(alias.name for alias in node.names)))
    return found


def room_files(room: str) -> list[Path]:
    return [path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts]


def test_the_rooms_are_found():
    assert {"modeling_castream", "training", "conversion", "evaluation"} <= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_stays_out_of_the_others_insides(room):
    """modeling_castream imports no room; the others import it, and one another only by their front door."""
    for path in room_files(room):
        for level, module, _ in imported(path):
            top, *inside = module.split(".")
            if level or top == room or top not in ROOMS:
                continue
            where = f"{path.relative_to(ROOT)} imports {module}"
            assert room != "modeling_castream", where
            assert top == "modeling_castream" or not inside, f"{where}: import it from {top} itself"


@pytest.mark.parametrize("path", [path for room in ROOMS for path in room_files(room)], ids=lambda p: p.stem)
def test_nobody_imports_commands_or_tests(path):
    forbidden = {"train", "publish", *SCRIPTS}
    assert not forbidden & {module.split(".")[0] for level, module, _ in imported(path) if level == 0}


@pytest.mark.parametrize("path", PAYLOAD, ids=lambda path: path.stem)
def test_the_hub_payload_is_flat(path):
    """transformers' loader follows `from .name import ...` only, and copies no folders."""
    for level, module, _ in imported(path):
        if level:
            assert level == 1 and module in {p.stem for p in PAYLOAD}, f"{path.name} imports {'.' * level}{module}"
        else:
            top = module.split(".")[0]
            assert top in PAYLOAD_IMPORTS or top in sys.stdlib_module_names, f"{path.name} imports {module}"
