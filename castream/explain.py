"""Photos explained, from the command line and from Python: answers, overlays, and one contact sheet."""

import glob
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from castream.artifacts.files import write_file
from castream.data.decoding import PHOTO_SUFFIXES
from modeling_castream.decoding_castream import decode_image

from .command import DEFAULT_MODEL
from .contact_sheet import ContactSheet
from .sources import load_pipeline

SHEET = "contact_sheet.png"
JPEG_QUALITY = 92
KEPT = ("label", "score", "method", "pooling", "layer")  # of an answer whose overlay is a file


@dataclass(frozen=True)
class ExplainedPhoto:
    """A photo and what was found in it.

    Args:
        path: the photo's file.
        answers: as of the image-explanation pipeline, one per class, method and pooling: label, score, method, pooling,
            layer, saliency, box, overlay. Where overlays are written to a folder, `file` takes the place of the last
            three, so that thousands of photos fit into memory.
        error: why the photo could not be read, where it could not; it has no answers then.
    """

    path: Path
    answers: list[dict]
    error: str | None = None


def explain_photos(
    photos: str | os.PathLike | Sequence[str | os.PathLike],
    model: str = DEFAULT_MODEL,
    *,
    output: str | os.PathLike | None = None,
    progress: bool = True,
    **options,
) -> list[ExplainedPhoto]:
    """Explain what a classifier saw in photos.

    Args:
        photos: files, folders and patterns.
        model: folder or Hub id of a castream model, or a classifier that `castream convert` takes.
        output: folder for overlays and a contact sheet; None: nothing is written.
        options: method, pooling, layer, target, top_k, alpha, as the image-explanation pipeline takes them.

    Returns:
        One per photo, in the order given; photos that cannot be read have an `error`.

    Raises:
        ValueError: where there is no photo, an option is wrong, or the model is refused.
        OSError: where the model cannot be read, or the output cannot be written.
    """
    paths = find_photos([photos] if isinstance(photos, (str, os.PathLike)) else photos, leave_out=output)
    return list(_explain_each(paths, model, output, progress, options))


def find_photos(names: Sequence[str | os.PathLike], leave_out: str | os.PathLike | None = None) -> list[Path]:
    """The files that names stand for: a file for itself, a folder for all images below it, a pattern for its matches.

    A name without a file is kept, to be reported with the photos that cannot be read.

    Args:
        leave_out: folder that is passed over inside the others, as the one that an earlier call has written to.

    Raises:
        ValueError: where none is left.
    """
    found: dict[Path, None] = {}
    written = leave_out and Path(leave_out).expanduser().resolve()
    for name in map(os.path.expanduser, names):
        path = Path(name)
        if path.is_dir():
            inside = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in PHOTO_SUFFIXES)
            found.update((file, None) for file in inside if file.is_file() and written not in file.resolve().parents)
        elif path.exists() or not glob.has_magic(name):
            found[path] = None
        else:
            matches = (Path(match) for match in sorted(glob.glob(name, recursive=True)))
            found.update((match, None) for match in matches if match.is_file())
    if not found:
        raise ValueError(f"no photo in {', '.join(map(str, names))}: give image files, folders of them, or patterns.")
    return list(found)


def run(photos: list[str], model: str, output: str, **options) -> int:
    """The command: print classes and scores, write the pictures; 0, 1 where no photo worked, 2 on bad input."""
    explained = unreadable = 0
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        for one in _explain_each(find_photos(photos, output), model, output, True, options):
            if one.error:
                unreadable += 1
                tqdm.write(f"skipped {one.path}: {one.error}", file=sys.stderr)
                continue
            explained += 1
            tqdm.write(f"{one.path}\n{_table(one.answers)}")
    except (ValueError, OSError) as error:
        print(f"castream explain: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if explained:
        print(f"{explained} explained: {Path(output, SHEET)}, and the overlays beside it")
    if unreadable:
        print(f"{unreadable} of {explained + unreadable} photos could not be read", file=sys.stderr)
    return 0 if explained else 1


def _explain_each(paths: list[Path], model: str, output, progress: bool, options: dict) -> Iterator[ExplainedPhoto]:
    options = {name: value for name, value in options.items() if value is not None}
    options["target"] = _targets(options.get("target"))
    pipe = load_pipeline(model)
    folder = None if output is None else Path(output).expanduser()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    sheet, taken = ContactSheet(model, pipe.color_map()), set()
    for path in tqdm(paths, unit="photo", disable=not progress or len(paths) == 1):
        try:
            photo = open_photo(path)
        except UnreadablePhoto as error:
            yield ExplainedPhoto(path, [], str(error))
            continue
        answers = pipe(photo, **options)
        if folder:
            sheet.add(path.name, photo, answers)
            answers = _write_overlays(folder, path, answers, taken)
        yield ExplainedPhoto(path, answers)
    if folder and sheet.rows:
        write_file(folder / SHEET, _encoded(sheet.draw(), "PNG"))


class UnreadablePhoto(ValueError):
    """A file is no image that can be decoded; the message says what it is, without its path."""


def open_photo(path: Path) -> Image.Image:
    """A photo as RGB, upright.

    Raises:
        UnreadablePhoto: where it cannot be decoded.
    """
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise UnreadablePhoto(error.strerror or str(error)) from error
    except ValueError as error:
        raise UnreadablePhoto(str(error)) from error


def _write_overlays(folder: Path, path: Path, answers: list[dict], taken: set[str]) -> list[dict]:
    """Write the overlays of a photo; returns its answers, with files in the place of pictures."""
    written = []
    for answer in answers:
        label = re.sub(r"[^\w-]+", "-", answer["label"])[:40].strip("-")
        name = stem = f"{path.stem}.{label}.{answer['method']}.{answer['pooling']}"
        number = 1
        while name.casefold() in taken:  # photos of one name in several folders, classes of one label
            number += 1
            name = f"{stem}.{number}"
        taken.add(name.casefold())
        file = folder / f"{name}.jpg"
        write_file(file, _encoded(answer["overlay"], "JPEG", quality=JPEG_QUALITY))
        written.append({**{key: answer[key] for key in KEPT}, "file": file})
    return written


def _encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _table(answers: list[dict]) -> str:
    """A line per class and pooling."""
    several = len({answer["pooling"] for answer in answers}) > 1
    lines = []
    for answer in answers:
        pooling = f"  ({answer['pooling']})" if several else ""
        lines.append(f"  {answer['score']:7.2%}  {answer['label']}{pooling}")
    return "\n".join(dict.fromkeys(lines))


def _targets(target) -> list[int | str] | None:
    """Classes by id or label, as the pipeline takes them: the command line has text only."""
    if target is None:
        return None
    several = [target] if isinstance(target, (int, str)) else target
    return [int(one) if isinstance(one, str) and one.isdecimal() else one for one in several]
