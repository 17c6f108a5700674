"""Settings of every test: 8 virtual CPU devices, strict promotion of ranks, no leaked warnings."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


_FORGET = 150  # tests; compiled programs of thousands of tests would fill the memory and slow down the rest
_run = 0


def pytest_runtest_teardown(item):
    global _run
    _run += 1
    if _run % _FORGET == 0:
        jax.clear_caches()
