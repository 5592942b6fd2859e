"""What the Hub payload says where a library is too old."""

import importlib.metadata

import pytest

from modeling_castream import requirements_castream
from modeling_castream.requirements_castream import check_versions


def test_the_installed_versions_are_new_enough():
    check_versions()


def test_an_old_library_is_named_with_the_remedy_in_one_line(monkeypatch):
    installed = {"torch": "2.14.1+cpu", "transformers": "5.2.0.dev0", "huggingface-hub": "0.36.0"}
    monkeypatch.setattr(requirements_castream, "version", installed.get)
    monkeypatch.setattr(requirements_castream, "MINIMUM", {"torch": (2, 11), "transformers": (5, 17)})
    with pytest.raises(ImportError) as caught:
        check_versions()
    assert str(caught.value) == (
        "This CA-Stream model needs transformers >= 5.17 (here is 5.2.0.dev0): pip install -U 'transformers>=5.17'"
    )


def test_a_library_without_metadata_is_let_through(monkeypatch):
    def unknown(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(requirements_castream, "version", unknown)
    check_versions()
