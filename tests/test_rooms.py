"""Who may import whom (docs/architecture.md), and what the Hub's loader can follow."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Floor by floor, from the ground up: a room imports from lower floors only.
FLOORS = (
    ("modeling_castream",),
    ("artifacts",),
    ("data",),
    ("conversion", "evaluation"),
    ("publishing",),
    ("training",),
    ("castream", "app", "benchmarks", "docs"),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
COMMANDS = ("train", "publish")  # scripts in the checkout's root
PAYLOAD = sorted((ROOT / "modeling_castream").glob("*_castream.py"))
# What the Hub payload may need on a loader's machine besides the standard library; httpx comes with transformers.
PAYLOAD_IMPORTS = {"torch", "transformers", "huggingface_hub", "timm", "torchvision", "numpy", "PIL", "httpx"}


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


def room_of(module: str) -> str | None:
    """The room that an absolute import leads to: `castream.data.loader` -> data, `torch.nn` -> None."""
    first, *inside = module.split(".")
    if first == "castream" and inside and inside[0] in FLOOR:
        return inside[0]
    return first if first in FLOOR else None


def test_every_room_has_its_floor():
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py")) and path.name != "tests"}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("path", [path for room in FLOOR for path in room_files(room)], ids=lambda p: p.stem)
def test_arrows_point_downwards(path):
    """No room imports from its own floor or a higher one, another room's underscore names, a command or a test."""
    room = path.relative_to(ROOT).parts[0]
    for level, module, names in imported(path):
        target = None if level else room_of(module)
        where = f"{path.relative_to(ROOT)} imports {module} {names}"
        assert level or module.split(".")[0] not in (*COMMANDS, "tests"), where
        if target is None or target == room:
            continue
        assert FLOOR[target] < FLOOR[room], where
        assert module.startswith(("castream", "modeling_castream")), f"{where}: rooms go by their installed names"
        assert not any(part.startswith("_") for part in (*module.split("."), *names)), where


@pytest.mark.parametrize("path", PAYLOAD, ids=lambda path: path.stem)
def test_the_hub_payload_is_flat(path):
    """transformers' loader follows `from .name import ...` only, and copies no folders."""
    for level, module, _ in imported(path):
        if level:
            assert level == 1 and module in {p.stem for p in PAYLOAD}, f"{path.name} imports {'.' * level}{module}"
        else:
            top = module.split(".")[0]
            assert top in PAYLOAD_IMPORTS or top in sys.stdlib_module_names, f"{path.name} imports {module}"


def test_the_page_on_architecture_speaks_of_this_tree():
    """Every file and room that it names exists, and each room stands on its floor."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([\w/]+(?:\.py|/))`", page)
    assert len(named) > 25 and [name for name in named if not (ROOT / name).exists()] == []
    floor, found = None, {}
    for number, rooms in re.findall(r"^\| (\d?) ?\| (.*?) \|", page, flags=re.MULTILINE):
        floor = int(number) if number else floor
        found |= dict.fromkeys(re.findall(r"`(\w+)/`", rooms), floor)
    assert found == FLOOR
