"""The conformance tests download transformers' source distribution: only `pytest -m conformance` collects them."""

collect_ignore = ["stand_ins"]

# Marks in transformers' test files, which its own configuration and conftest register.
MARKS = ("accelerate_tests", "torch_compile_test", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "order")
MARKS += ("all_flash_attn_test", "bitsandbytes", "deepspeed_test", "generate")


def pytest_configure(config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: used by transformers' own tests")


def pytest_ignore_collect(config) -> bool | None:
    asked = config.option.markexpr
    return None if "conformance" in asked and "not conformance" not in asked else True
