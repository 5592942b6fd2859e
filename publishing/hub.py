"""Getting a folder onto the Hub in one commit, and saying plainly what went wrong where it does not get there."""

import os
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

# Files that an earlier publication may have left and this one does not have. Everything else in the repository stays.
OWN_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*_castream.py",
    "results.json",
    "recipe.json",
    "figures/*.png",
]
# Another framework's weights beside ours would be a second model under the same name.
FOREIGN_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack"]
AGAIN = "No repository is left half-changed: run the same command again"
REASONS = {
    401: "the Hub refuses the token (401): log in again with `hf auth login`, or set HF_TOKEN to a valid token",
    403: "the token may not write to {repo_id} (403): use a token with write access to it",
    404: "{repo_id} or its branch does not exist, or the token may not see it (404)",
    409: "{repo_id} was changed by someone else meanwhile (409). {again}",
    412: "{repo_id} was changed by someone else meanwhile (412). {again}",
    429: "the Hub asks to slow down (429). {again} in some minutes",
}


class PublishError(RuntimeError):
    """The Hub, or the way to it, did not do what was asked."""


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be a repository.

    Raises:
        ValueError: naming the id and the form it needs.
    """
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(
            f"repo id {repo_id!r} is not valid: give USER/NAME or ORGANISATION/NAME, of letters, digits and -_."
        )


def check_token() -> None:
    """Refuse to start without a token.

    Raises:
        PublishError: where neither the environment nor a login has one.
    """
    if not get_token():
        raise PublishError("no Hugging Face token: log in with `hf auth login`, or set HF_TOKEN.")


def explain_error(error: Exception, repo_id: str) -> PublishError:
    """One line about a failed request. It never carries request headers, hence no token."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError):
        reason = "no Hugging Face token: log in with `hf auth login`, or set HF_TOKEN"
    elif status in REASONS:
        reason = REASONS[status].format(repo_id=repo_id, again=AGAIN)
    elif status is not None and status >= 500:
        reason = f"the Hub has a problem of its own ({status}). {AGAIN} in some minutes"
    elif status is not None:
        reason = f"the Hub refuses ({status}): {getattr(error, 'server_message', None) or 'no reason given'}"
    else:
        reason = f"the connection to the Hub broke ({type(error).__name__}). {AGAIN}"
    return PublishError(f"{reason}.")


def upload(
    folder: Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Publish the model",
) -> CommitInfo:
    """Create the repository where needed, and make its files those of `folder`, in one commit or none.

    Large files go first, under names of their own content: until the commit, which is one request, nobody sees any of
    them. A repeated run sends only what is missing.

    Args:
        private: visibility of a new repository; True also refuses one that is already public.
        revision: branch, created where needed; None for main.
        create_pr: whether to open a pull request instead of committing to the branch.

    Returns:
        The commit; the one that was already there where nothing differs.

    Raises:
        PublishError: with one line about what went wrong.
    """
    api = HfApi()
    where = {"repo_id": repo_id, "repo_type": repo_type}
    try:
        extra = {"space_sdk": "gradio"} if repo_type == "space" else {}
        api.create_repo(**where, private=private, exist_ok=True, **extra)
        info = api.repo_info(**where)
        if private and not info.private:
            raise PublishError(f"{repo_id} is public already: make it private in its settings, or leave out --private.")
        if revision is not None and not create_pr:
            api.create_branch(**where, branch=revision, exist_ok=True)
        head = api.repo_info(**where, revision=revision).sha
        return api.upload_folder(
            **where,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr or None,
            parent_commit=head,
            delete_patterns=OWN_FILES + FOREIGN_FILES if repo_type == "model" else None,
            commit_message=message,
        )
    except (HTTPError, LocalTokenNotFoundError, ConnectionError) as error:
        raise explain_error(error, repo_id) from error
    except (ValueError, RuntimeError) as error:
        if isinstance(error, PublishError):
            raise
        raise _explain_wrapped(error, repo_id) from error


def _explain_wrapped(error: Exception, repo_id: str) -> PublishError:
    """The Hub client wraps what fails in one of its upload threads; the cause says more."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, HTTPError):
        return explain_error(cause, repo_id)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return PublishError(f"the Hub refuses: {first}")


def repo_url(repo_id: str, repo_type: str = "model") -> str:
    """The page of a repository."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{'spaces/' if repo_type == 'space' else ''}{repo_id}"
