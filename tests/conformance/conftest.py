"""The stand-ins for files of transformers' tests are no tests, and its tests' marks are registered here."""

import pytest
from transformers.utils import logging

collect_ignore = ["stand_ins"]

# Marks in transformers' test files, which its own configuration and conftest register.
MARKS = ("accelerate_tests", "torch_compile_test", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "order")
MARKS += ("all_flash_attn_test", "bitsandbytes", "deepspeed_test", "generate")


def pytest_configure(config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: used by transformers' own tests")


@pytest.fixture(autouse=True)
def warnings_are_logged():
    """Transformers' tests read its warnings, which a command that ran in this process may have turned off."""
    logging.set_verbosity_warning()
