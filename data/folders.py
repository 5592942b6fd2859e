"""What a folder is: photos in class folders or with a table of labels, or parquet or tar shards; and its splits.

A folder is what most of its files are, and what is left out is said. A folder called as a split is one, wherever it
stands in the path, and never a class. A label stands in a `metadata` table, or else is the folder that a photo lies in.
"""

import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .decoding import PHOTO_SUFFIXES, readable_suffixes
from .files import FileTree
from .labels import LABEL_COLUMNS, normalize_name
from .tables import read_table

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
METADATA_FILES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
PATH_COLUMNS = ("file_name", "filename", "file", "path", "filepath", "image_path", "image", "img")


@dataclass
class Photos:
    """The photos of a split.

    Args:
        columns: lists of equal length: "image" has paths, "label" and whatever else is known beside it.
        class_names: where the labels are names of folders: these, sorted.
        only_class: the folder that all lie in, where that says nothing.
        notes: what was left out or guessed.
        unlabelled: why there are no labels, or "".
    """

    columns: dict[str, list]
    class_names: list[str] | None = None
    only_class: str | None = None
    notes: list[str] = field(default_factory=list)
    unlabelled: str = ""


@dataclass
class Shards:
    """Files of a split that `datasets` streams.

    Args:
        builder: "parquet" or "webdataset".
        files: their paths.
        notes: what was left out or guessed.
    """

    builder: str
    files: list[str]
    notes: list[str] = field(default_factory=list)


def open_folder(root: str, split: str, beside: Sequence[str] = (), label_column: str | None = None) -> Photos | Shards:
    """Find the files of a split in a folder or zip archive.

    Args:
        root: path or address.
        beside: names of other splits, whose files are none of this one's.
        label_column: of its tables, where its name is unusual.

    Raises:
        ValueError: where the split is not there, or it cannot be told what the folder is; in one line.
        OSError: where it cannot be listed.
    """
    tree = FileTree(root)
    files, dangling = tree.files()
    photos = [path for path in files if _suffix(path) in readable_suffixes()]
    tables = [path for path in files if posixpath.basename(path) in METADATA_FILES]
    all_files = sorted(files + dangling)  # a shard that is gone must not be passed over: opening it says so
    parquet = [path for path in all_files if _suffix(path) == ".parquet" and path not in tables]
    tars = [path for path in all_files if _suffix(path) == ".tar"]
    shards = parquet if len(parquet) >= len(tars) else tars
    others = [path for path in (*parquet, *tars) if path not in shards]
    if not photos and not shards:
        raise ValueError(f"{root} cannot be opened: it holds {_what_else(files)}.")
    if len(photos) == len(shards):
        raise ValueError(f"{root} holds as many photos ({_some(photos)}) as shards ({_some(shards)}): move one away.")
    if len(shards) > len(photos):
        chosen = _shards_of_split(shards, split, beside, root)
        notes = _left_out(root, {"not a shard of its kind": [*others, *photos]})
        return Shards("parquet" if shards is parquet else "webdataset", [tree.path(path) for path in chosen], notes)
    inner, notes = _photos_of_split(photos, split, beside, root)
    unread = [path for path in files if _suffix(path) in PHOTO_SUFFIXES and _suffix(path) not in readable_suffixes()]
    archives = [path for path in files if _suffix(path) in (".zip", ".tar", ".parquet") and path not in tables]
    notes += _left_out(
        root,
        {
            "a link that leads nowhere": dangling,
            "pip install pillow-heif opens these": [path for path in unread if _suffix(path) != ".avif"],
            "a newer Pillow opens these": [path for path in unread if _suffix(path) == ".avif"],
            "no photo": archives,
        },
    )
    found = _label(tree, files, inner, tables, root, label_column)
    found.notes = notes + found.notes
    return found


def open_table(path: str, split: str, label_column: str | None = None) -> Photos:
    """The photos that a table names, by paths relative to it.

    Args:
        split: its rows, where the table has a column "split".

    Raises:
        ValueError: where it is no table of photos, or has no such split.
        OSError: where it cannot be read.
    """
    folder, name = posixpath.split(path.replace("\\", "/"))
    tree = FileTree(folder or ".")
    rows, notes = _read_rows(tree, [name], _Existing(tree, path))
    if not rows:
        raise ValueError(f"{path} names no photo: {' '.join(notes) or 'it has no rows.'}")
    if "split" in rows[0]:
        wanted = (split, *next((names for names in SPLIT_NAMES.values() if split in names), ()))
        rows = [row for row in rows if row.pop("split") in wanted]
        if not rows:
            raise ValueError(f"{path} has no rows of the split {split!r}.")
    else:
        check_single_file(path, split)
    return _with_columns(rows, tree, notes, label_column)


def check_single_file(path: str, split: str) -> None:
    """A single file is for training, unless its name says otherwise.

    Raises:
        ValueError: where the split is another one.
    """
    name = posixpath.basename(path)
    names = SPLIT_NAMES.get(_canonical(split), (split,))
    if _canonical(split) != "train" and not any(_names_split(name, alias) for alias in names):
        raise ValueError(f"{path} names no split, so that all of it is 'train', and there is no {split!r}.")


def photos_of(paths: Iterable[str], label_column: str | None = None) -> Photos:
    """Photos named one by one, with the metadata tables among them.

    Raises:
        ValueError: where there is none.
    """
    paths = sorted(paths)
    root = posixpath.commonpath([posixpath.dirname(path) for path in paths]) if paths else ""
    files = [posixpath.relpath(path, root or ".") for path in paths]
    photos = {path: _without_split(path) for path in files if _suffix(path) in readable_suffixes()}
    if not photos:
        raise ValueError(f"there is no photo among the data_files: they are {_what_else(files)}.")
    tables = [path for path in files if posixpath.basename(path) in METADATA_FILES]
    return _label(FileTree(root or "."), files, photos, tables, root, label_column)


def _without_split(path: str) -> str:
    """A path without the first folder in it that is called as a split."""
    *folders, name = path.split("/")
    place = next((place for place, folder in enumerate(folders) if _is_split(folder, ())), len(folders))
    return "/".join([*folders[:place], *folders[place + 1 :], name])


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _some(paths: Sequence[str]) -> str:
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "") if paths else "none"


def _what_else(files: list[str]) -> str:
    archives = [path for path in files if _suffix(path) in (".zip", ".tar", ".gz", ".tgz", ".7z")]
    unread = [path for path in files if _suffix(path) in PHOTO_SUFFIXES]
    if archives:
        return f"archives only, such as {archives[0]}: unpack them, or give a zip archive of photos by itself"
    if unread:
        return f"photos that cannot be read here, such as {unread[0]}: install pillow-heif"
    return f"no photo, parquet or tar file but {_some(files)}" if files else "no file"


def _left_out(root: str, kinds: dict[str, list[str]]) -> list[str]:
    where = posixpath.basename(root)
    return [f"{where}: left out {_some(paths)} ({why})." for why, paths in kinds.items() if paths]


def _canonical(split: str) -> str:
    return next((name for name, names in SPLIT_NAMES.items() if split.lower() in names), split)


def _names_split(path: str, split: str) -> bool:
    """Whether a path has a split's name as a word of it: `test` is not in `latest`."""
    return re.search(rf"(?<![a-z0-9]){re.escape(split)}(?:set)?(?![a-z])", path, re.IGNORECASE) is not None


def _shards_of_split(files: list[str], split: str, beside: Sequence[str], root: str) -> list[str]:
    """Files of a split, told by its name in the path; all are for training where no split is named."""
    others = {name for names in SPLIT_NAMES.values() for name in names} | set(beside) - {split}
    aliases = [name for name in SPLIT_NAMES.get(_canonical(split), ()) if name not in beside]
    for name in (split, *aliases):
        if found := [path for path in files if _names_split(path, name)]:
            return found
    named = [path for path in files if any(_names_split(path, name) for name in others)]
    if _canonical(split) != "train" or named:
        raise ValueError(f"no file below {root} has the split {split!r} in its name, only {_some(named or files)}.")
    return files


def _photos_of_split(
    photos: list[str], split: str, beside: Sequence[str], root: str
) -> tuple[dict[str, str], list[str]]:
    """The photos of a split, each with its path inside the split, and what is to be said.

    Raises:
        ValueError: where the split is not there, naming those that are.
    """
    inside = {path: path[len(split) + 1 :] for path in photos if path.startswith(f"{split}/")}
    if inside:
        return inside, []
    by_split, rest = {}, {}
    for path in photos:
        *folders, name = path.split("/")
        place = next((place for place, folder in enumerate(folders) if _is_split(folder, (split, *beside))), None)
        if place is None:
            rest[path] = path
        else:
            by_split.setdefault(folders[place], {})[path] = "/".join([*folders[:place], *folders[place + 1 :], name])
    if split in by_split:
        return by_split[split], []
    alike = [name for name in by_split if _canonical(_word(name)) == _canonical(split) and name not in beside]
    if len(alike) == 1:
        return by_split[alike[0]], [f"{posixpath.basename(root)}: the split {split!r} is its folder {alike[0]}."]
    if alike:
        raise ValueError(f"{root} has no split {split!r} but {', '.join(sorted(alike))}: name one of them.")
    if _canonical(split) == "train" and rest:
        names = ", ".join(sorted(by_split))
        return rest, [f"{posixpath.basename(root)}: {split!r} is all but its folders {names}."] if by_split else []
    known = ", ".join(sorted(by_split)) or "train, which is all of it"
    raise ValueError(f"{root} has no split {split!r}, only {known}: name one of them, or make a folder of that name.")


def _word(folder: str) -> str:
    """`train2017` -> `train`."""
    return re.sub(r"[-_. ]?\d+$", "", folder.lower())


def _is_split(folder: str, asked: Sequence[str]) -> bool:
    return folder in asked or any(_word(folder) in names for names in SPLIT_NAMES.values())


def _label(
    tree: FileTree, files: list[str], inner: dict[str, str], tables: list[str], root: str, label_column: str | None
) -> Photos:
    """Find the labels of photos: in their metadata, or else their folders' names."""
    rows, notes = _read_rows(tree, tables, _Listed(files, inner))
    if rows:
        mentioned = {value for row in rows for value in row.values() if isinstance(value, str)}
        unnamed = [path for path in inner if path not in mentioned]
        notes += _left_out(root, {f"not in {tables[0]}": unnamed})
        found = _with_columns(rows, tree, notes, label_column)
        if not found.unlabelled:
            return found
        chosen, columns, notes = [row["image"] for row in rows], found.columns, found.notes
    else:
        chosen, columns = list(inner), {"image": [tree.path(path) for path in inner]}
    found = _label_by_folders(chosen, [inner[path] for path in chosen], columns, notes, root)
    if rows and found.unlabelled:
        found.unlabelled = f"{tables[0]} has no label column"
    return found


def _label_by_folders(
    paths: list[str], inner: list[str], columns: dict[str, list], notes: list[str], root: str
) -> Photos:
    """Take the folders that all photos lie in, at the same depth, for their classes."""
    folders = [tuple(normalize_name(part) for part in path.split("/")[:-1]) for path in inner]
    only = None
    while folders and all(folders) and len({folder[0] for folder in folders}) == 1:
        only = folders[0][0]
        folders = [folder[1:] for folder in folders]
    inside = [folder for folder in folders if folder]
    depth = min(map(len, inside), default=0)
    names = sorted({folder[depth - 1] for folder in inside})
    strays = [path for path, folder in zip(paths, folders, strict=True) if not folder]
    reason = ""
    if not inside:
        reason = f"all its photos lie in one folder{f', {only}' if only else ''}, without a metadata.csv"
    elif len(names) == 1:
        reason = f"{names[0]} is its only class folder, beside {_some(strays)}"
    elif len(strays) > len(inside):
        reason = f"most of its photos, such as {strays[0]}, lie in no class folder"
    if reason:
        return Photos(columns, None, only if not inside else None, notes, reason)
    deeper = [path for path, folder in zip(paths, folders, strict=True) if len(folder) > depth]
    if deeper:
        where = posixpath.basename(root)
        notes.append(
            f"{where}: photos lie at several depths, such as {deeper[0]}; the classes are {', '.join(names[:5])}."
        )
    notes += _left_out(root, {"beside the class folders": strays})
    keep = [place for place, folder in enumerate(folders) if folder]
    columns = {name: [values[place] for place in keep] for name, values in columns.items()}
    ids = {name: number for number, name in enumerate(names)}
    labels = [ids[folder[depth - 1]] for folder in folders if folder]
    return Photos(columns | {"label": labels}, names, None, notes)


@dataclass
class _Listed:
    """Finds a file that a table names among those of a folder; names in composed and decomposed Unicode are equal."""

    files: list[str]
    photos: dict[str, str]

    def __post_init__(self):
        self.by_name = {normalize_name(path): path for path in self.files}

    def __call__(self, path: str) -> str | None:
        return self.by_name.get(normalize_name(path))

    def is_wanted(self, path: str) -> bool:
        return path in self.photos


@dataclass
class _Existing:
    """Finds a file that a table names where it says."""

    tree: FileTree
    table: str

    def __call__(self, path: str) -> str | None:
        if "://" in self.tree.root:
            return path
        forms = (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))
        return next((form for form in forms if os.path.isfile(self.tree.path(form))), None)

    def is_wanted(self, path: str) -> bool:
        return True


def _read_rows(tree: FileTree, tables: list[str], find: Callable) -> tuple[list[dict], list[str]]:
    """What tables say about the photos that are wanted: rows with the photo as "image", and what is to be said."""
    rows, notes = [], []
    for table in tables:
        folder, columns = posixpath.dirname(table), read_table(tree.path(table))
        name_column = next((name for name in PATH_COLUMNS if name in columns), None)
        if name_column is None:
            notes.append(f"{tree.path(table)} has no column file_name but {', '.join(columns)}: it is left out.")
            continue
        missing, found = [], []
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            named = str(row.pop(name_column) or "")
            path = find(_join(folder, named))
            if path is None:
                missing.append(named)
            elif find.is_wanted(path):
                found.append({"image": path} | _with_paths(row, folder, find))
        if missing and not found and not any(find(_join(folder, str(name))) for name in columns[name_column]):
            raise ValueError(f"none of the photos that {tree.path(table)} names is there, such as {missing[0]}.")
        notes += _left_out(tree.path(table), {"no such file": missing})
        rows += found
    return rows, notes


def _join(folder: str, name: str) -> str:
    return posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))


def _with_paths(row: dict, folder: str, find: Callable) -> dict:
    """`mask_file_name` -> `mask`, a path."""
    return {
        name.removesuffix("_file_name"): find(_join(folder, value)) if name.endswith("_file_name") and value else value
        for name, value in row.items()
    }


def _with_columns(rows: list[dict], tree: FileTree, notes: list[str], label_column: str | None) -> Photos:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    for name in ("image", "mask"):
        if name in columns:
            columns[name] = [path if path is None else tree.path(path) for path in columns[name]]
    reason = "" if any(name in columns for name in (*LABEL_COLUMNS, label_column)) else "its table has no label column"
    return Photos(columns, notes=notes, unlabelled=reason)
