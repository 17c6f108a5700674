"""Steps with a straight-through backward: step_ste and sign_ste pass the cotangent on as if they were the identity.

    step_ste    y = 1 where x > 0, else 0             dx = dy
    sign_ste    y = −1, 0, 1 as x < 0, = 0, > 0       dx = dy

The true derivatives are 0 wherever they exist, and teach nothing. These rules are *not* the gradient of their function, by
intent (``exact=False``), and nothing is kept.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fbackprop.one_line import elementwise

__all__ = ["sign_ste", "step_ste"]


@elementwise(lambda: jnp.float32(1.0), exact=False, keeps="nothing", minimum=lambda: 0)
def step_ste(x: ArrayLike) -> jax.Array:
    """The step of a perceptron, 1 where x > 0 and 0 where x ≤ 0, with a straight-through backward: dx = dy.

    x [...] -> y [...], of the same dtype. Source: Bengio, Léonard & Courville 2013, arXiv:1308.3432.
    """
    x = jnp.asarray(x)
    return (x > 0).astype(x.dtype)


@elementwise(lambda: jnp.float32(1.0), exact=False, keeps="nothing", minimum=lambda: 0)
def sign_ste(x: ArrayLike) -> jax.Array:
    """The sign, −1, 0 or 1, with a straight-through backward: dx = dy.

    x [...] -> y [...], of the same dtype. For weights and activations of one bit.
    Source: Courbariaux, Bengio & David 2015, arXiv:1511.00363.
    """
    return jnp.sign(jnp.asarray(x))
