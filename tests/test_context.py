"""The switch (fbackprop/context.py): without_rules under every transformation, never stale, one trace for each mode.

The rules here have backwards that are deliberately 100 times too large: which of the two ran can be read off.
"""

import functools
import inspect
import os
import threading
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as S

from fbackprop import context
from fbackprop.context import without_rules
from fbackprop.rules import RULES, rule

traces: Counter = Counter()


def _cube_forward(x, gain):
    traces["forward"] += 1
    return gain * x**3, (x, gain)


def _cube_backward(saved, dy):
    x, gain = saved
    return 100 * dy * 3 * gain * x**2, 100 * (dy * x**3).sum()


@rule(forward=_cube_forward, backward=_cube_backward)
def cube(x, gain=1.0):
    """gain · x³, elementwise."""
    traces["reference"] += 1
    return gain * x**3


CUBE = RULES.pop("cube")
X = jnp.array([1.0, -2.0, 3.0])
TRUE = 3 * X**2
MESH = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))


def total(fn):
    return lambda x: fn(x).sum()


def close(ours, wanted):
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def _while(x):
    return lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, cube(c[1])), (0, x))[1]


@jax.custom_jvp
def somebodys_jvp(x):
    return cube(x)


somebodys_jvp.defjvp(lambda primals, tangents: (cube(primals[0]), tangents[0] * cube(primals[0]) / primals[0] * 3))


# One application of cube to x, inside of everything that traces.
FUNCTIONS = {
    "plain": cube,
    "jit": jax.jit(lambda x: cube(x)),
    "jit of the op itself": jax.jit(cube),
    "jit in jit": jax.jit(lambda x: jax.jit(lambda x: cube(x) + 0)(x)),
    "static and keyword": jax.jit(functools.partial(cube, gain=1.0)),
    "scan": lambda x: lax.scan(lambda c, v: (c, cube(v)), 0.0, x)[1],
    "jit of scan": jax.jit(lambda x: lax.scan(lambda c, v: (c, cube(v)), 0.0, x)[1]),
    "fori_loop": lambda x: lax.fori_loop(0, 1, lambda i, c: cube(c), x),
    "map": lambda x: lax.map(cube, x),
    "cond": lambda x: lax.cond(x[0] > 0, cube, jnp.zeros_like, x),
    "switch": jax.jit(lambda x: lax.switch(1, [jnp.zeros_like, cube], x)),
    "remat": jax.checkpoint(lambda x: cube(x)),
    "jit of remat": jax.jit(jax.checkpoint(lambda x: cube(x))),
    "vmap": jax.vmap(lambda x: cube(x)),
    "vmap of jit": jax.vmap(jax.jit(lambda x: cube(x))),
    "associative_scan": lambda x: cube(lax.associative_scan(jnp.maximum, x)) * 0 + cube(x),
    "shard_map": lambda x: jax.shard_map(cube, mesh=MESH, in_specs=S("i"), out_specs=S("i"))(jnp.resize(x, 8))[:3],
    "custom_jvp": lambda x: jax.nn.relu(cube(x) + 1000) - 1000,
    "inner value_and_grad": lambda x: jax.value_and_grad(lambda x: (x * lax.stop_gradient(x)).sum())(x)[0] * 0 + cube(x),
}


OUTER = {"eager": lambda f: f, "jit": jax.jit, "checkpoint": jax.checkpoint}
SOME = ("plain", "jit", "scan", "vmap", "shard_map")  # under checkpoint as well


@pytest.mark.parametrize(
    ("outer", "name"), [(outer, name) for outer in OUTER for name in FUNCTIONS if outer == "jit" or name in SOME]
)
def test_reverse_mode_inside_everything_and_never_stale(outer, name):
    if (outer, name) == ("checkpoint", "shard_map") and os.environ.get("JAX_REMAT3"):
        pytest.skip("jax 0.10.2 has no eager shard_map inside the new checkpoint, with or without a custom_vjp")
    fn = OUTER[outer](FUNCTIONS[name])
    twin = without_rules(fn)
    # The two modes take turns on the same jitted inner functions.
    for _ in range(2):
        close(jax.grad(total(fn))(X), 100 * TRUE)
        close(jax.grad(total(twin))(X), TRUE)
        close(without_rules(jax.grad(total(fn)))(X), TRUE)
        close(jax.jit(jax.grad(total(twin)))(X), TRUE)
        close(jax.jit(jax.grad(total(fn)))(X), 100 * TRUE)
        close(fn(X), X**3)
        close(twin(X), X**3)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_of_the_twin_inside_everything(name):
    fn = FUNCTIONS[name]
    twin = without_rules(fn)
    direction = jnp.array([1.0, 0.5, -1.0])
    close(jax.jvp(twin, (X,), (direction,))[1], TRUE * direction)
    close(jax.linearize(twin, X)[1](direction), TRUE * direction)
    close(jax.jit(lambda x, t: jax.jvp(twin, (x,), (t,))[1])(X, direction), TRUE * direction)
    close(jax.hessian(total(twin))(X), jnp.diag(6 * X))
    close(without_rules(jax.hessian(total(fn)))(X), jnp.diag(6 * X))
    with pytest.raises((TypeError, NotImplementedError)):
        jax.jvp(fn, (X,), (direction,))


@pytest.mark.parametrize("name", SOME)
def test_second_derivatives_of_the_twin_in_any_order(name):
    twin = without_rules(FUNCTIONS[name])
    close(jax.jacfwd(jax.jacfwd(total(twin)))(X), jnp.diag(6 * X))
    close(jax.jacrev(jax.jacfwd(total(twin)))(X), jnp.diag(6 * X))
    close(jax.jacrev(jax.jacrev(total(twin)))(X), jnp.diag(6 * X))


def test_while_loops_are_differentiated_forward():
    close(jax.jvp(without_rules(_while), (X,), (jnp.ones(3),))[1], TRUE)
    close(jax.jvp(without_rules(jax.jit(_while)), (X,), (jnp.ones(3),))[1], TRUE)
    with pytest.raises((TypeError, NotImplementedError)):
        jax.jvp(_while, (X,), (jnp.ones(3),))


def test_grad_inside_the_function():
    @jax.jit
    def slope(x):
        return jax.grad(total(cube))(x)

    @jax.jit
    def mixed(x):
        return jax.vmap(jax.grad(cube))(x), slope(x)

    for _ in range(2):
        close(slope(X), 100 * TRUE)
        close(without_rules(slope)(X), TRUE)
        for value in mixed(X):
            close(value, 100 * TRUE)
        for value in without_rules(mixed)(X):
            close(value, TRUE)
    close(jax.grad(total(without_rules(slope)))(X), 6 * X)
    close(jax.jacfwd(total(without_rules(slope)))(X), 6 * X)


def test_inside_other_peoples_custom_jvp_and_custom_vjp():
    close(jax.grad(total(without_rules(somebodys_jvp)))(X), TRUE)
    close(jax.jvp(without_rules(somebodys_jvp), (X,), (jnp.ones(3),))[1], TRUE)
    theirs = jax.custom_vjp(lambda x: cube(x))
    theirs.defvjp(lambda x: jax.vjp(cube, x), lambda pullback, dy: pullback(dy))
    close(jax.grad(total(theirs))(X), 100 * TRUE)
    close(jax.grad(total(without_rules(theirs)))(X), TRUE)
    with pytest.raises((TypeError, NotImplementedError)):  # the limit: forward mode ends at somebody else's custom_vjp
        jax.jvp(without_rules(theirs), (X,), (X,))


def test_only_the_part_that_is_wrapped_is_a_twin():
    def half(x):
        return cube(x).sum() + without_rules(cube)(x).sum()

    close(jax.grad(half)(X), 101 * TRUE)
    close(jax.grad(jax.jit(half))(X), 101 * TRUE)
    close(jax.grad(without_rules(half))(X), 2 * TRUE)


def test_one_trace_for_each_mode():
    inner = Counter()

    @jax.jit
    def fn(x):
        inner[context.uses_references()] += 1
        return cube(x * 2, 0.5)

    x = jnp.arange(7.0)  # a shape of its own
    traces.clear()
    for _ in range(3):
        fn(x), without_rules(fn)(x)
        jax.jit(fn)(x), jax.jit(without_rules(fn))(x)
    assert inner == {False: 1, True: 1}
    first = Counter(traces)
    assert first["reference"] >= 2
    grads = [jax.jit(jax.grad(total(fn))), jax.jit(jax.grad(total(without_rules(fn)))), jax.grad(total(without_rules(fn)))]
    for grad in grads:
        grad(x)
    again = Counter(traces)
    for _ in range(3):
        for grad in grads:
            grad(x + 1)
        fn(x + 1), without_rules(fn)(x + 1)
    assert traces == again
    assert inner == {False: 1, True: 1}


def test_the_eager_op_is_traced_once_for_each_mode():
    x = jnp.arange(11.0)
    traces.clear()
    cube(x)
    assert traces["forward"] <= 1
    without_rules(cube)(x)
    first = Counter(traces)
    assert 2 <= first["reference"] <= 3  # with rules it checks the arguments
    for _ in range(3):
        cube(x)
        without_rules(cube)(x)
    assert traces == first


def test_nesting_is_harmless_and_the_mode_is_restored():
    seen = []
    inner = without_rules(lambda: seen.append(context.uses_references()))

    def outer():
        seen.append(context.uses_references())
        inner()
        seen.append(context.uses_references())

    without_rules(outer)()
    inner()
    seen.append(context.uses_references())
    assert seen == [True, True, True, True, False]


def test_an_exception_restores_the_mode():
    def broken(x):
        assert context.uses_references()
        raise KeyError("broken")

    for run in (without_rules(broken), jax.jit(without_rules(broken)), jax.grad(without_rules(broken))):
        with pytest.raises(KeyError, match="broken"):
            run(1.0)
        assert not context.uses_references()
    close(jax.grad(cube)(2.0), 1200.0)


def test_threads_have_modes_of_their_own():
    results: dict[str, list] = {"rules": [], "references": [], "child": []}
    barrier = threading.Barrier(2, timeout=60)
    shared = jax.jit(lambda x: cube(x))

    def child():
        results["child"].append(context.uses_references())

    def work(name, wrap):
        for _ in range(20):
            barrier.wait()
            results[name].append(float(jax.grad(wrap(shared))(2.0)))

    def with_child():
        thread = threading.Thread(target=child)
        thread.start()
        thread.join()

    threads = [
        threading.Thread(target=work, args=("rules", lambda f: f)),
        threading.Thread(target=work, args=("references", without_rules)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    without_rules(with_child)()
    assert results["rules"] == [1200.0] * 20
    assert results["references"] == [12.0] * 20
    assert results["child"] == [False], "a thread starts with the rules on, whatever the mode of the one that made it"


def test_the_limits_that_the_documentation_tells_of():
    # What was made before the switch was thrown keeps what it was made with: a pullback, an executable, a jaxpr.
    pullback = jax.vjp(cube, X)[1]
    close(without_rules(pullback)(jnp.ones(3))[0], 100 * TRUE)
    pullback = jax.vjp(without_rules(cube), X)[1]
    close(pullback(jnp.ones(3))[0], TRUE)
    compiled = jax.jit(jax.grad(total(cube))).lower(X).compile()
    close(without_rules(compiled)(X), 100 * TRUE)
    jaxpr = jax.make_jaxpr(total(cube))(X)
    close(jax.grad(without_rules(lambda x: jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x)[0]))(X), 100 * TRUE)
    # A function that fn returns runs after the switch has been thrown back, and so does the body of a generator.
    assert jax.grad(without_rules(lambda: cube)())(2.0) == 1200.0
    assert jax.grad(without_rules(lambda: without_rules(cube))())(2.0) == 12.0

    def generator():
        yield jax.grad(cube)(2.0)

    assert list(without_rules(generator)()) == [1200.0]
    assert list(without_rules(lambda: list(generator()))()) == [12.0]


def test_without_rules_keeps_names_and_signature_and_refuses_what_is_not_a_function():
    twin = without_rules(cube)
    assert inspect.signature(twin) == inspect.signature(cube)
    assert (twin.__name__, twin.__doc__) == (cube.__name__, cube.__doc__)
    close(twin(gain=2.0, x=X), 2 * X**3)
    with pytest.raises(TypeError, match="without_rules: expected a function, got ArrayImpl"):
        without_rules(X)  # type: ignore[arg-type]

    class Layer:
        def __call__(self, x):
            return cube(x)

        def method(self, x):
            return cube(x)

    for fn in (Layer(), Layer().method, functools.partial(cube, gain=1.0)):
        close(jax.grad(total(without_rules(fn)))(X), TRUE)


def test_the_halves_by_hand_are_rules_in_every_mode():
    def by_hand(x):
        y, saved = cube.forward(x, jnp.float32(1))
        return y, cube.backward(saved, jnp.ones_like(y))[0]

    for run in (by_hand, without_rules(by_hand), jax.jit(by_hand), jax.jit(without_rules(by_hand))):
        y, dx = run(X)
        close(y, X**3)
        close(dx, 100 * TRUE)


def test_second_order_of_the_twin_is_true_and_of_the_rule_is_the_rules():
    close(jax.grad(lambda x: jax.grad(total(cube))(x).sum())(X), 100 * 6 * X)
    close(jax.grad(lambda x: jax.grad(total(without_rules(cube)))(x).sum())(X), 6 * X)
    close(jax.grad(without_rules(lambda x: jax.grad(total(cube))(x).sum()))(X), 6 * X)
