"""From a model folder to its Hub page: assemble, verify, upload."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from castream.artifacts.files import check_free, new_folder

from .folder import Publication, assemble, list_files
from .hub import PublishError, check_repo_id, check_token, repo_url, upload
from .space import write_space
from .verify import verify


@dataclass(frozen=True)
class Published:
    """What `publish` did.

    Args:
        files: (path, size in bytes) of every file of the model's repository folder.
        difference: largest relative difference between the model and the folder loaded in a fresh process.
        url: page of the commit or pull request; of a dry run, the folder.
        commit: its id, None for a dry run.
        space_url: page of the Space, or its folder, if one was asked for.
    """

    files: list[tuple[str, int]]
    difference: float
    url: str
    commit: str | None = None
    space_url: str | None = None


def publish(
    model_dir: str | os.PathLike,
    repo_id: str,
    *,
    results_dir: str | os.PathLike | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    space: bool = False,
    dry_run: str | os.PathLike | None = None,
    max_shard_size: str = "5GB",
    **card,
) -> Published:
    """Publish a model folder: weights, code, image processor, card, figures and results, in one commit.

    The folder is assembled beside, loaded in a fresh process without castream, and uploaded only if the model answers
    there as it does here. Publishing again without changes makes no commit.

    Args:
        model_dir: folder with a CAStreamForImageClassification and its image processor.
        repo_id: `USER/NAME` or `ORGANISATION/NAME`; created where needed.
        results_dir: output folder of `python -m evaluation`.
        private: visibility of a new repository; None: the account's default.
        revision: branch to commit to, created where needed; None for main.
        create_pr: open a pull request instead.
        space: also write the Space of the same id, a page that explains people's images with this model.
        dry_run: a new or empty folder to write instead of uploading; with `space`, its sibling `FOLDER-space`.
        max_shard_size: weights beyond this are split.
        card: what the card cannot know from the folder: `base_model`, `license`, `datasets`, `example`, `figures`;
            see `Publication`.

    Raises:
        ValueError: on a model folder, results or an id that cannot be published, before anything is sent.
        PublishError: where the Hub, or the way to it, fails.
    """
    check_repo_id(repo_id)
    results_dir = None if results_dir is None else Path(results_dir)
    publication = Publication(Path(model_dir), repo_id, results_dir, **card)
    if dry_run is None:
        check_token()
    else:
        for target in (Path(dry_run), space_folder(dry_run)) if space else (Path(dry_run),):
            check_free(target)
    with tempfile.TemporaryDirectory(prefix="castream-publish-") as scratch:
        folder = Path(scratch)
        difference = verify(folder, assemble(publication, folder, max_shard_size))
        files = list_files(folder)
        if dry_run is not None:
            return Published(
                files, difference, str(dry_run), space_url=_keep(folder, dry_run, repo_id if space else None)
            )
        commit = upload(folder, repo_id, private=private, revision=revision, create_pr=create_pr)
    if space:
        _upload_space(repo_id, commit.oid, private)
    url = (commit.pr_url if create_pr else None) or commit.commit_url
    return Published(files, difference, url, commit.oid, repo_url(repo_id, "space") if space else None)


def _keep(folder: Path, dry_run: str | os.PathLike, space_of: str | None) -> str | None:
    """Move a checked folder to where a dry run wants it, with the Space of a model beside it.

    Returns:
        The Space's folder, None without one.
    """
    space_dir = space_folder(dry_run)
    if space_of is not None:
        with new_folder(space_dir) as partial:
            write_space(partial, space_of, None)
    with new_folder(Path(dry_run)) as partial:
        for path in folder.iterdir():
            shutil.move(path, partial)
    return None if space_of is None else str(space_dir)


def _upload_space(repo_id: str, commit: str, private: bool | None) -> None:
    """Publish the page of a model, which loads the model's `commit`."""
    with tempfile.TemporaryDirectory(prefix="castream-publish-") as scratch:
        write_space(Path(scratch), repo_id, commit)
        try:
            upload(Path(scratch), repo_id, repo_type="space", private=private, message="Publish the page")
        except PublishError as error:
            raise PublishError(f"the model is published, its page is not: {error}") from error


def space_folder(dry_run: str | os.PathLike) -> Path:
    """Where a dry run puts the Space: beside the model's folder."""
    return Path(dry_run).with_name(f"{Path(dry_run).name}-space")
