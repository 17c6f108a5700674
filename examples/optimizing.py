"""Initialisers, schedules and optimizers: those of jax.nn and optax, with layers that run hand-written backward passes.

This library has none of its own, because none is needed: a layer takes any initialiser of ``jax.nn.initializers``, its
parameters are a pytree, and optax updates pytrees. Here a small network learns to tell points inside of a ring from others.

    python examples/optimizing.py
"""

import jax
import jax.numpy as jnp
import optax
from jax.nn import initializers

import fbackprop as fb
from fbackprop.layers import BatchNorm, Dense, PReLU, WeightNorm, residual, serial

STEPS = 300

# Initialisers: of single layers, by name of the option; drawn in the dtype of ``param_dtype``.
block = serial(Dense(32, kernel_init=initializers.orthogonal(scale=0.5)), PReLU())
model = serial(
    Dense(32, kernel_init=initializers.he_normal(), bias_init=initializers.uniform(0.1)),
    BatchNorm(use_bias=False),
    fb.silu,
    residual(block),
    WeightNorm(Dense(2, kernel_init=initializers.variance_scaling(0.1, "fan_in", "truncated_normal"))),
)

x = jax.random.uniform(jax.random.key(0), (512, 2), minval=-1.5, maxval=1.5)
radius = fb.safe_norm(x, 0.0, axis=-1)
labels = ((radius > 0.6) & (radius < 1.2)).astype(jnp.int32)

params, state = model.init(jax.random.key(1), x)

# A schedule is a function of the step, and an optimizer a chain of transformations, of which a mask keeps weight decay away
# from vectors.
schedule = optax.warmup_cosine_decay_schedule(init_value=0.0, peak_value=0.03, warmup_steps=20, decay_steps=STEPS)
matrices = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(),
    optax.add_decayed_weights(1e-3, mask=matrices),
    optax.scale_by_learning_rate(schedule),
)


def loss(params, state):
    logits, state = model.apply(params, x, state=state, train=True)
    return fb.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state


@jax.jit
def step(params, state, memory):
    (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params, state)  # our backward passes
    updates, memory = optimizer.update(gradient, memory, params)
    return optax.apply_updates(params, updates), state, memory, value


memory = optimizer.init(params)
for i in range(STEPS):
    if i % 100 == 0:
        print(f"step {i:3}   rate {schedule(i):.4f}   loss {loss(params, state)[0]:.3f}")
    params, state, memory, _ = step(params, state, memory)
accuracy = (model(params, x, state).argmax(-1) == labels).mean()
print(f"after {STEPS} steps {accuracy:.1%} of the points are told right")
assert accuracy > 0.95
