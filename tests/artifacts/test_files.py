"""Files and folders appear under their names whole, with the umask's mode, or not at all."""

import os
import stat

import pytest
from castream.artifacts.files import check_free, new_file, new_folder, read_json, write_file, write_json


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_failed_write_leaves_the_file_of_before(tmp_path):
    write_file(tmp_path / "file", b"before")
    with pytest.raises(OSError, match=r"cannot write .*file: disk full"), new_file(tmp_path / "file") as partial:
        partial.write_bytes(b"half")
        raise OSError("disk full")
    assert (tmp_path / "file").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_a_failed_folder_leaves_the_folder_of_before(tmp_path):
    for text in ("before", None):
        with pytest.raises(RuntimeError) if text is None else new_folder(tmp_path / "out") as partial:
            if text is None:
                with new_folder(tmp_path / "out") as partial:
                    (partial / "file").write_text("half")
                    raise RuntimeError
            (partial / "file").write_text(text)
    assert (tmp_path / "out" / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_modes_follow_the_umask(tmp_path):
    write_json(tmp_path / "file.json", {"a": 1})
    with new_folder(tmp_path / "out") as partial:
        (partial / "private").touch(0o600)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file.json", "out", "out/private")]
    assert modes == [0o640, 0o750, 0o640]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*nowhere/file: No such file"):
        write_file(tmp_path / "nowhere" / "file", b"")


def test_only_a_new_or_empty_folder_is_free(tmp_path):
    check_free(tmp_path / "new")
    check_free(tmp_path)
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            check_free(taken)


def test_json_is_an_object_or_refused_by_its_file_s_name(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}
    assert read_json(tmp_path / "b.json", missing_ok=True) is None
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
    for text, message in (("{", "a.json is not JSON"), ("[1]", "a.json holds a JSON list, expected an object")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
