"""Settings of every test: 8 virtual CPU devices, strict promotion of ranks, no leaked warnings.

Most of a test's time goes into compiling. By default LLVM's optimizations are off, which takes a third of it away; XLA's own,
which decide what is fused and kept, are on. With --slow, or with ``XLA_FLAGS=--xla_backend_optimization_level=3``, all are as
users have them (.ci/run does so on one Python).
"""

import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"] and "--slow" not in sys.argv:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


# Families of alike cases, of which each n-th runs by default and all with --slow: the default run stays below ten minutes.
THINNED = {
    "test_attention.py::test_values_and_gradients_are_those_of_jax": 2,
    "test_bank.py::test_a_right_function_passes": 2,
    "test_bank.py::test_a_wrong_rule_is_caught_by_the_check_that_is_named_for_it": 3,
    "test_bank.py::test_what_only_shows_in_depth_is_caught_there": 2,
    "test_checking.py::test_right_functions_pass": 3,
    "test_context.py::test_forward_mode_of_the_twin_inside_everything": 2,
    "test_context.py::test_reverse_mode_inside_everything_and_never_stale": 3,
    "test_conv_pool.py::test_conv_transpose_is_flax_conv_transpose": 2,
    "test_conv_pool.py::test_depthwise_grouped_and_thin_convolutions_are_the_compilers": 2,
    "test_docs.py::test_the_example_is_found_by_the_check_that_it_stands_for": 2,
    "test_from_flax.py::test_linen": 2,
    "test_layers.py::test_by_hand_is_the_gradient": 2,
    "test_layers.py::test_dtypes_are_those_of_flax": 2,
    "test_layers.py::test_init": 2,
    "test_models.py::test_by_hand_is_the_gradient": 2,
    "test_ops.py::test_values_and_gradients_of_jax_nn_and_optax": 2,
    "test_rules_from_table.py::test_a_wrong_backward_is_caught_for_every_cotangent": 4,
    "test_rules_from_table.py::test_check_is_clean_under_transformations": 4,
    "test_rules_from_table.py::test_the_halves_by_hand_are_the_vjp": 2,
    "test_rules_from_table.py::test_without_rules_gives_forward_mode": 2,
    "test_training.py::test_the_step_is_the_textbook_loop": 3,
    "test_vocabulary.py::test_every_schedule_in_several_blocks_is_optax": 2,
}


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    seen = dict.fromkeys(THINNED, 0)
    for item in items:
        family = item.nodeid.split("[")[0].removeprefix("tests/")
        if "slow" in item.keywords:
            item.add_marker(skip)
        elif family in THINNED:
            if seen[family] % THINNED[family]:
                item.add_marker(skip)
            seen[family] += 1


_FORGET = 150  # tests; compiled programs of thousands of tests would fill the memory and slow down the rest
_run = 0


def pytest_runtest_teardown(item):
    global _run
    _run += 1
    if _run % _FORGET == 0:
        jax.clear_caches()
