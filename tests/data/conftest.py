"""The tests of training and of data read the same tiny dataset."""

from tests.training.conftest import options, tiny_dataset, tiny_model

__all__ = ["options", "tiny_dataset", "tiny_model"]
