"""Classes by name: which of the model's classes a dataset's labels are, and where that cannot be said."""

import unicodedata

import numpy as np
import pytest
import torch
from castream.data.labels import UnknownClassesError, class_ids, match_classes


@pytest.mark.parametrize(
    ("ours", "theirs", "to_model"),
    [
        (["cat", "dog"], ["cat", "dog"], None),
        (["dog", "cat"], ["bee", "cat", "dog"], {0: 2, 1: 1}),
        (["great_white Shark"], ["tench", "Great White shark"], {0: 1}),
        (["tench", "goldfish"], ["goldfish, Carassius auratus", "tench, Tinca tinca"], {0: 1, 1: 0}),
        (
            [unicodedata.normalize("NFD", "Käfer"), "Ameise"],
            ["Ameise", unicodedata.normalize("NFC", "Käfer")],
            {0: 1, 1: 0},
        ),
        (["0", "10", "2"], [f"LABEL_{index}" for index in range(11)], {0: 0, 1: 10, 2: 2}),
    ],
)
def test_names_decide(ours, theirs, to_model):
    assert match_classes(ours, theirs, "d").to_model == to_model


@pytest.mark.parametrize(
    ("ours", "theirs", "named"),
    [
        (["n01440764", "n01443537"], ["tench", "goldfish"], "'n01440764' for 'tench'"),
        (["ant", "crane", "other crane"], ["ant", "crane", "crane"], "'other crane' for 'crane'"),
        (
            ["ant", "crane bird", "crane"],
            ["ant", "crane (n02012849)", "crane (n03126707)"],
            "'crane bird' for 'crane (",
        ),
        (["ant", "bee"], ["LABEL_0", "LABEL_1"], "'ant' for 'LABEL_0'"),
        (["ant", "bee"], [f"LABEL_{index}" for index in range(5)], "'ant' for 'LABEL_0'"),
    ],
)
def test_numbers_where_there_are_no_names_are_said(ours, theirs, named):
    match = match_classes(ours, theirs, "d")
    assert match.to_model is None and "taken by their numbers" in match.note and named in match.note


@pytest.mark.parametrize(
    ("ours", "theirs", "unknown"),
    [
        (["dog", "horse"], ["cat", "dog"], "horse"),
        (["cat", "dog", "wasp"], ["bee", "cat", "dog"], "wasp"),
        (["cat", "dog", "horse"], ["cat", "dog"], "horse"),
    ],
)
def test_one_shared_name_at_another_place_refutes_numbers(ours, theirs, unknown):
    with pytest.raises(ValueError, match=rf"^d has .*, but {unknown} is not one of the model's") as error:
        match_classes(ours, theirs, "d")
    assert not isinstance(error.value, UnknownClassesError)


@pytest.mark.parametrize(
    ("ours", "theirs", "unknown"),
    [
        (["wasp", "cat", "dog"], ["bee", "cat", "dog"], "wasp"),
        (["cat", "dog", "wasp"], ["cat", "dog", "bee"], "wasp"),
        (["wasp", "cat", "fox"], ["bee", "Cat", "fox"], "wasp"),
    ],
)
def test_one_name_that_differs_refutes_numbers(ours, theirs, unknown):
    """A wasp is no bee, even where cats and dogs stand at their places."""
    with pytest.raises(ValueError, match=rf"^d has 3 .*, but {unknown} is not one of the model's: give them the same"):
        match_classes(ours, theirs, "d")


def test_equal_counts_are_no_match():
    with pytest.raises(
        UnknownClassesError, match=r"d has 2 classes \(rome, \.\.\.\), and the model 2 \(cat, \.\.\.\), and none"
    ):
        match_classes(["rome", "paris"], ["cat", "dog"], "d")


@pytest.mark.parametrize(
    ("label", "ids"),
    [(3, [3]), ("3", [3]), (b"3", [3]), (3.0, [3]), ("bee", [1]), (" bee", [1]), (None, []), (-1, []), ("-1", []),
     ([0, 2], [0, 2]), (["bee", "3"], [1, 3]), ([1, -1, -1], [1]), ([], []), (np.int64(2), [2]),
     (torch.tensor([2, 4]), [2, 4])],
)  # fmt: skip
def test_labels_of_all_kinds(label, ids):
    assert class_ids(label, {"bee": 1}, "x") == ids


@pytest.mark.parametrize(
    "label", [[0, 1, 0, 1, 0], [0.0, 1.0, 1.0], [2, 2], 1.5, "wasp", {"id": 3}, np.array([0, 1, 1])]
)
def test_what_is_no_class_id_is_refused(label):
    """Zeros and ones of all classes would otherwise pass for the ids 0 and 1."""
    with pytest.raises(ValueError, match=r"label .* of sample x .*: give (a class id|class ids)"):
        class_ids(label, {"bee": 1}, "x")
