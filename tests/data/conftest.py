"""The tests of training and of data read the same tiny dataset."""

from tests.training.conftest import fresh_process_state, options, tiny_dataset, tiny_model

__all__ = ["fresh_process_state", "options", "tiny_dataset", "tiny_model"]
