"""The flags under which the suite runs, set once, before any test.

First pass: 64-bit types on, strict dtype promotion, rank promotion an error. Second pass (`INITJAX_TEST_X64=0`):
JAX as a user has it by default, for the tests marked `x64_off`, the docstrings and the README.
"""

import os

import jax
import pytest

X64 = os.environ.get("INITJAX_TEST_X64", "1") != "0"

jax.config.update("jax_enable_x64", X64)
if X64:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_report_header(config):
    return f"jax {jax.__version__}, 64-bit types {'on, strict promotion' if X64 else 'off'}"


def pytest_collection_modifyitems(config, items):
    """Each pass runs its own tests: those marked `x64_off` and the examples belong to the second."""
    keep, leave = [], []
    for item in items:
        second = item.get_closest_marker("x64_off") is not None or isinstance(item, pytest.DoctestItem)
        (leave if second == X64 else keep).append(item)
    if leave:
        config.hook.pytest_deselected(items=leave)
        items[:] = keep
