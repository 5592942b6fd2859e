"""The folder of a run: whose it is, who works in it, and where everything lies.

settings.yaml   the settings of the run
checkpoints/    where it can go on from
initial/        the model as training found it: converted, with its classifier
model/          the trained model
evaluation/     results.json, results.md, examples.png
logs/           what the tracker wrote
bad_images.txt  what did not decode, if anything
"""

import shutil
from pathlib import Path

import yaml
from castream.artifacts.files import remove_partial, write_file
from filelock import FileLock, Timeout

# Settings that may differ between a run and its continuation: they change neither the model nor its evaluation.
FREE = ("num_workers", "checkpoint_steps", "keep_checkpoints", "log_steps", "saliency_steps", "tracker", "output_dir")
FREE += ("cache_limit_gib", "compile_backbone", "push_to_hub", "hub_model_id", "max_bad_fraction")
SETTINGS_FILE = "settings.yaml"
LOCK_SECONDS = 20  # a run that was told to stop may still be saving


def recorded_settings(path: str) -> dict:
    """What a run's folder holds as its settings; nothing, where it holds none or they cannot be read."""
    try:
        return dict(yaml.safe_load(Path(path, SETTINGS_FILE).read_text()))
    except (OSError, yaml.YAMLError, TypeError, ValueError):
        return {}


class RunFolder:
    """The folder of a run, claimed by the main process for as long as it lives.

    Args:
        path: of the folder.
        settings: of the run, by name, as YAML gives them back.
        is_main: whether this process writes.

    Raises:
        ValueError: where the folder holds another run, something else, or is in use; in one line.
        OSError: where it cannot be written.
    """

    def __init__(self, path: str, settings: dict, is_main: bool = True):
        self.path = Path(path)
        self.checkpoints, self.logs = self.path / "checkpoints", self.path / "logs"
        self.initial, self.model = self.path / "initial", self.path / "model"
        self.evaluation, self.features = self.path / "evaluation", self.path / "features"
        self.bad_images = self.path / "bad_images.txt"
        self._settings = self.path / SETTINGS_FILE
        if is_main:
            self._claim(settings)

    def _claim(self, settings: dict) -> None:
        self._check(settings)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock", timeout=LOCK_SECONDS)
            self._lock.acquire()
        except Timeout:
            raise ValueError(f"output_dir={self.path} is in use by another running training.") from None
        except OSError as error:
            raise OSError(f"cannot write output_dir={self.path}: {error.strerror}; choose another one.") from error
        self._check(settings)
        remove_partial(self.path)
        write_file(self._settings, yaml.safe_dump(settings, sort_keys=False).encode())

    def _check(self, settings: dict) -> None:
        """Refuse a folder that is not this run's."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir={self.path} is a file: choose another one.")
        if not self._settings.is_file():
            strangers = (
                [path.name for path in self.path.iterdir() if path.name != ".lock"] if self.path.is_dir() else []
            )
            strangers = [name for name in strangers if not name.endswith(".partial")]
            if strangers:
                raise ValueError(f"output_dir={self.path} holds something else ({strangers[0]}): choose another one.")
            return
        try:
            there = dict(yaml.safe_load(self._settings.read_text()))
        except (OSError, yaml.YAMLError, TypeError, ValueError):
            raise ValueError(f"{self._settings} cannot be read: choose another output_dir.") from None
        for name, value in settings.items():
            found = there.get(name, "absent")
            if name not in FREE and found != value:
                raise ValueError(
                    f"output_dir={self.path} holds another run ({name} is {found!r} there, {value!r} here): choose "
                    "another output_dir, or delete that one."
                )

    def check_shared(self) -> None:
        """Refuse a folder that this process, perhaps on another node, does not see; after the main one has claimed it.

        Raises:
            ValueError: saying so.
        """
        if not self._settings.is_file():
            raise ValueError(f"output_dir={self.path} is not the same folder on all nodes: choose a shared one.")

    def release(self) -> None:
        """Give the folder free and tidy up what only a running training needs."""
        shutil.rmtree(self.features, ignore_errors=True)
        self._lock.release()  # its file stays: whoever waits for it has it open

    def note_bad_images(self, lines: list[str]) -> None:
        """Add to the list of images that did not decode; an image that several epochs met stands there once.

        Args:
            lines: of a StreamLoader: file, tab, reason.
        """
        known = self.bad_images.read_text(encoding="utf-8").splitlines() if self.bad_images.is_file() else []
        if new := [line for line in dict.fromkeys(lines) if line not in known]:
            write_file(self.bad_images, "".join(f"{line}\n" for line in (*known, *new)).encode())
