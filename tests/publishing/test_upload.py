"""Uploading to the Hub's stand-in: one commit or none, never a mixture, and a clear line for everything that fails."""

import pytest
from castream.publishing import PublishError
from castream.publishing.hub import check_repo_id, check_token, upload

from tests.hub_stand_in import TOKEN, Blob
from tests.publishing.models import save_model

REPO = "someone/model"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models: the first in several shards, the second in one file."""
    root = tmp_path_factory.mktemp("folders")
    save_model(root / "first", seed=1, max_shard_size="40KB")
    save_model(root / "second", seed=2)
    return root / "first", root / "second"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(hub, **kwargs):
    return {path: data for path, data in hub.files(REPO, **kwargs).items() if path != ".gitattributes"}


def test_one_commit_holds_the_whole_folder_and_a_second_upload_makes_none(hub, folders):
    first, _ = folders
    commit = upload(first, REPO)
    assert published(hub) == contents(first)
    assert len(hub.repo(REPO).commits) == 2  # the Hub's own first one, and ours
    again = upload(first, REPO)
    assert again.oid == commit.oid == hub.repo(REPO).refs["main"]
    assert len(hub.repo(REPO).commits) == 2


def test_a_new_model_replaces_all_files_of_the_old_one_and_keeps_the_user_s_own(hub, folders):
    first, second = folders
    assert sum(name.endswith(".safetensors") for name in contents(first)) > 1
    upload(first, REPO)
    tree = {**hub.repo(REPO).commits[hub.repo(REPO).refs["main"]], "notes.txt": Blob(b"mine", False)}
    hub.repo(REPO).commit(tree, "add notes", "main")
    upload(second, REPO)
    assert published(hub) == {**contents(second), "notes.txt": b"mine"}


FAULTS = {
    "LFS connection dropped": ("PUT", "/lfs/", {"drop_after": 1000, "times": 99}, "connection to the Hub broke"),
    "LFS server error": ("PUT", "/lfs/", {"status": 500, "times": 99}, r"problem of its own \(500\)"),
    "LFS batch slowed down": ("POST", "objects/batch", {"status": 429, "times": 99}, r"slow down \(429\)"),
    "preupload refused": (
        "POST",
        "/preupload/",
        {"status": 403, "times": 99},
        r"may not write to someone/model \(403\)",
    ),
    "commit slowed down": ("POST", "/commit/", {"status": 429}, r"slow down \(429\).*run the same command again"),
    "commit server error": ("POST", "/commit/", {"status": 500}, r"problem of its own \(500\)"),
    "commit refused": ("POST", "/commit/", {"status": 403}, r"may not write .* \(403\)"),
    "token expired before the commit": ("POST", "/commit/", {"status": 401}, r"refuses the token \(401\)"),
    "conflict": ("POST", "/commit/", {"status": 412}, "changed by someone else meanwhile"),
    "commit connection dropped": ("POST", "/commit/", {"drop_after": 100}, "connection to the Hub broke"),
    "create server error": ("POST", "/repos/create", {"status": 500, "times": 99}, r"problem of its own \(500\)"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda name: name.replace(" ", "_"))
def test_a_fault_ends_in_one_clear_line_and_a_second_run_completes(hub, folders, fault):
    first, second = folders
    upload(first, REPO)
    method, pattern, kwargs, message = FAULTS[fault]
    switched_on = hub.fail(method, pattern, **kwargs)
    with pytest.raises(PublishError, match=message) as caught:
        upload(second, REPO)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert switched_on.times < kwargs.get("times", 1)  # it did happen
    assert published(hub) == contents(first)
    hub.faults.clear()
    upload(second, REPO)
    assert published(hub) == contents(second)
    trees = [{path: blob.content for path, blob in tree.items()} for tree in hub.repo(REPO).commits.values()]
    weights = [{name: data for name, data in tree.items() if ".safetensors" in name} for tree in trees]
    whole = [{name: data for name, data in contents(folder).items() if ".safetensors" in name} for folder in folders]
    assert all(found in [{}, *whole] for found in weights)


def test_one_dropped_connection_is_survived_without_a_second_run(hub, folders):
    fault = hub.fail("PUT", "/lfs/", drop_after=1000)
    upload(folders[1], REPO)
    assert fault.times == 0
    assert published(hub) == contents(folders[1])


def test_an_interrupted_upload_sends_only_what_is_missing(hub, folders):
    first, _ = folders
    hub.fail("POST", "/commit/", status=500)
    with pytest.raises(PublishError):
        upload(first, REPO)
    before = len([path for method, path in hub.requests if method == "PUT"])
    assert before > 1
    upload(first, REPO)
    assert len([path for method, path in hub.requests if method == "PUT"]) == before
    assert published(hub) == contents(first)


def test_somebody_else_s_commit_in_between_is_not_overwritten(hub, folders):
    first, second = folders
    upload(first, REPO)
    tree = hub.repo(REPO).commits[hub.repo(REPO).refs["main"]]
    hub.fail(
        "POST",
        "/preupload/",
        action=lambda: hub.repo(REPO).commit({**tree, "notes.txt": Blob(b"", False)}, "x", "main"),
    )
    with pytest.raises(PublishError, match=r"changed by someone else meanwhile \(412\)"):
        upload(second, REPO)
    assert published(hub) == {**contents(first), "notes.txt": b""}


def test_a_lost_answer_to_a_commit_makes_no_second_commit(hub, folders):
    """The commit arrives, its answer does not: running again finds everything in place."""
    first, second = folders
    upload(first, REPO)
    tree = {name: Blob(data, name.endswith(".safetensors")) for name, data in contents(second).items()}
    tree[".gitattributes"] = Blob(hub.files(REPO)[".gitattributes"], False)
    hub.repo(REPO).commit(tree, "the commit whose answer was lost", "main")
    upload(second, REPO)
    assert len(hub.repo(REPO).commits) == 3


def test_a_wrong_token_and_a_foreign_namespace_are_refused(hub, folders, monkeypatch):
    hub.forbidden.add("somebody-else")
    with pytest.raises(PublishError, match=r"may not write to somebody-else/model \(403\)"):
        upload(folders[0], "somebody-else/model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PublishError, match=r"refuses the token \(401\)") as caught:
        upload(folders[0], REPO)
    assert "hf_wrong" not in str(caught.value)
    assert not hub.repos


def test_no_token_is_noticed_before_anything_is_done(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("castream.publishing.hub.get_token", lambda: None)
    with pytest.raises(PublishError, match="no Hugging Face token: log in"):
        check_token()


@pytest.mark.parametrize(
    "repo_id", ["model", "a/b/c", "a b/c", "someone/", "someone/..", "someone/mo--del", "http://x/y"]
)
def test_what_is_no_repo_id_is_refused(repo_id):
    with pytest.raises(ValueError, match="is not valid: give USER/NAME"):
        check_repo_id(repo_id)


def test_branch_pull_request_and_private(hub, folders):
    first, second = folders
    upload(first, REPO, private=True)
    assert hub.repo(REPO).private
    main = hub.repo(REPO).refs["main"]
    pull_request = upload(second, REPO, create_pr=True)
    assert pull_request.pr_url.endswith("/someone/model/discussions/1")
    assert hub.repo(REPO).refs["main"] == main
    assert published(hub, revision="refs/pr/1") == contents(second)
    upload(second, REPO, revision="next")
    upload(second, REPO, revision="next")
    assert hub.repo(REPO).refs["main"] == main
    assert published(hub, revision="next") == contents(second)


def test_private_is_not_promised_for_a_repository_that_is_public(hub, folders):
    upload(folders[0], REPO)
    with pytest.raises(PublishError, match="someone/model is public already"):
        upload(folders[1], REPO, private=True)
    assert published(hub) == contents(folders[0])
