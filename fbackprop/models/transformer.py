"""The stack of blocks that GPT and ViT share.

    q, k, v = norm(x) · qkv
    s = x + attention(q, k, v) · out
    x = s + mlp(norm(s))

Each line is one or two fused rules: norm_dense, dot_product_attention, residual_norm (the sum and the norm after it) with
dense, gelu_mlp or swiglu_mlp. A block keeps x, q, k, v, the output of attention, that of the projection after it and the
pre-activation of the MLP, once each. Its backward runs no matrix product and no attention a second time; it computes again
what is elementwise: norms, the sum s, the activation, and parameters in ``dtype``.

Parameters of the blocks are stacked along a leading axis and the blocks run by ``jax.lax.scan`` (``scan=True``: one block is
traced and compiled, whatever the depth), or they are a tuple with one entry a block and the blocks are unrolled.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.nn import initializers

from fbackprop import ops
from fbackprop.context import uses_references
from fbackprop.layers.base import Params
from fbackprop.layers.composed import Composed
from fbackprop.layers.linear import require_positive

__all__ = ["Transformer", "stack_blocks", "unstack_blocks"]

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""``attend(query, key, value, cache) -> (output, new cache)``, for one block."""

Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "gelu_exact", "swiglu"]


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class Transformer(Composed):
    """What GPT and ViT have in common: options and blocks.

    Args:
      layers: how many blocks. width: features of the stream. heads: of queries.
      kv_heads: heads of keys and values, each of which serves heads / kv_heads heads of queries; as many by default.
      hidden: the features inside the MLP; by default 4 · width, for swiglu ⅔ of that, rounded up to a multiple of 64.
      norm: "layer" or "rms". mlp: "gelu" (in the form with tanh), "gelu_exact" or "swiglu". use_bias: whether projections, and
        layer norms, have a bias.
      epsilon: of the norms.
      init_std: the standard deviation that kernels and tables begin with; GPT-2's 0.02 suits a width of 1,000, a small model
        learns faster from 1/√width.
      scan: whether the blocks are stacked and scanned, or unrolled.
      checkpoint: what of a block is computed again in the backward instead of kept: None for nothing, "full" for all, or the
        name of a policy in ``jax.checkpoint_policies`` ("dots_saveable").
      attention: the implementation, as for ``ops.dot_product_attention``.
      dtype: what is computed in (None: what the parameters are); statistics, softmax and loss in float32 or wider.
      param_dtype: what parameters are made in.
    Raises:
      ValueError: where an option does not fit.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    hidden: int | None = None
    norm: Norm = "layer"
    mlp: Mlp = "gelu"
    use_bias: bool = True
    epsilon: float = 1e-5
    init_std: float = 0.02
    scan: bool = True
    checkpoint: str | None = None
    attention: Literal["xla", "cudnn"] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("layers", "width", "heads", "kv_heads", "hidden")}
        require_positive(self.name, **{name: value for name, value in numbers.items() if value is not None})
        for name, known in (("norm", get_args(Norm)), ("mlp", get_args(Mlp)), ("attention", (None, "xla", "cudnn"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{self.name}: {name} is {getattr(self, name)!r}, expected {_either(known)}.")
        if self.width % self.heads:
            raise ValueError(f"{self.name}: width {self.width} does not divide into {self.heads} heads.")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"{self.name}: {self.heads} heads cannot share {self.kv_heads} heads of keys evenly.")
        policies = [name for name in dir(jax.checkpoint_policies) if name.endswith("saveable")]
        if self.checkpoint not in (None, "full", *policies):
            raise ValueError(f"{self.name}: checkpoint is {self.checkpoint!r}, expected {_either([None, 'full', *policies])}.")

    # Parameters.

    @property
    def _head_width(self) -> int:
        return self.width // self.heads

    @property
    def _key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def _hidden(self) -> int:
        if self.hidden is not None:
            return self.hidden
        return -(-8 * self.width // (3 * 64)) * 64 if self.mlp == "swiglu" else 4 * self.width

    def init_norm(self) -> Params:
        bias = {"bias": jnp.zeros(self.width, self.param_dtype)} if self.norm == "layer" and self.use_bias else {}
        return {"scale": jnp.ones(self.width, self.param_dtype), **bias}

    def init_blocks(self, key: Any) -> Any:
        """The parameters of all blocks, the same numbers whether stacked or not."""
        stacked = jax.vmap(self._init_block)(jax.random.split(key, self.layers))
        return stacked if self.scan else _unstacked(stacked, self.layers)

    def _init_block(self, key: Any) -> Params:
        width, hidden, keys = self.width, self._hidden, iter(jax.random.split(key, 5))
        # As in GPT-2: what adds to the stream starts smaller, the more blocks add to it.
        inner, outer = (initializers.normal(self.init_std * factor) for factor in (1, (2 * self.layers) ** -0.5))

        def dense(rows: int, columns: int, kernel: Any = inner) -> Params:
            bias = {"bias": jnp.zeros(columns, self.param_dtype)} if self.use_bias else {}
            return {"kernel": kernel(next(keys), (rows, columns), self.param_dtype), **bias}

        return {
            "attention_norm": self.init_norm(),
            "qkv": dense(width, (self.heads + 2 * self._key_heads) * self._head_width),
            "out": dense(width, width, outer),
            "mlp_norm": self.init_norm(),
            **({"gate": dense(width, hidden)} if self.mlp == "swiglu" else {}),
            "up": dense(width, hidden),
            "down": dense(hidden, width, outer),
        }

    # The blocks.

    def cast(self, tree: Any) -> Any:
        """Parameters in the dtype to compute in."""
        return tree if self.dtype is None else jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), tree)

    def run_blocks(self, blocks: Any, x: jax.Array, attend: Attend, cache: Any = None) -> tuple[jax.Array, Any]:
        """x [b, t, width] through all blocks. ``cache``: arrays with a leading axis, a block each takes one entry."""

        def body(x: jax.Array, given: Any) -> tuple[jax.Array, Any]:
            own, memory = given
            return self._block(own, x, lambda q, k, v: attend(q, k, v, memory))

        if self.checkpoint is not None:
            policy = None if self.checkpoint == "full" else getattr(jax.checkpoint_policies, self.checkpoint)
            body = jax.checkpoint(body, policy=policy, prevent_cse=not self.scan)
        if self.scan:
            return jax.lax.scan(body, x, (blocks, cache))
        entries = []
        for i, own in enumerate(blocks):
            x, entry = body(x, (own, jax.tree.map(lambda array, i=i: array[i], cache)))
            entries.append(entry)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *entries)

    def _block(self, p: Params, x: jax.Array, attend: Any) -> tuple[jax.Array, Any]:
        norm: dict[str, Any] = {"norm": self.norm, "epsilon": self.epsilon}

        def before(x: jax.Array, p: Params) -> jax.Array:
            first, qkv = p["attention_norm"], self.cast(p["qkv"])
            return ops.norm_dense(x, qkv["kernel"], qkv.get("bias"), first["scale"], first.get("bias"), **norm)

        def after(x: jax.Array, attended: jax.Array, p: Params) -> jax.Array:
            second, out = p["mlp_norm"], self.cast(p["out"])
            added = ops.dense(attended.reshape(x.shape), out["kernel"], out.get("bias"))
            y, s = ops.residual_norm(added, x, second["scale"], second.get("bias"), **norm)
            return s + self._mlp(p, y)

        # The results of matrix products are kept where a backward reads them; sums, norms and casts to ``dtype``, which are
        # elementwise, are computed again. (Without rules a block is as JAX differentiates it.)
        def lean(fn: Any) -> Any:
            policy = jax.checkpoint_policies.dots_saveable
            return fn if uses_references() else jax.checkpoint(fn, policy=policy, prevent_cse=not self.scan)

        qkv = lean(before)(x, p)
        heads = qkv.reshape(*qkv.shape[:-1], -1, self._head_width)
        attended, entry = attend(*jnp.split(heads, [self.heads, self.heads + self._key_heads], -2))
        return lean(after)(x, attended, p), entry

    def _mlp(self, p: Params, y: jax.Array) -> jax.Array:
        up, down = self.cast(p["up"]), self.cast(p["down"])
        if self.mlp == "swiglu":
            return ops.swiglu_mlp(y, self.cast(p["gate"])["kernel"], up["kernel"], down["kernel"])
        exact = self.mlp == "gelu_exact"
        return ops.gelu_mlp(y, up["kernel"], down["kernel"], up.get("bias"), down.get("bias"), approximate=not exact)

    def final_norm(self, p: Params, x: jax.Array) -> jax.Array:
        if self.norm == "rms":
            return ops.rms_norm(x, p["scale"], self.epsilon)
        return ops.layer_norm(x, p["scale"], p.get("bias"), self.epsilon)

    def require_params(self, params: Any) -> None:
        """Refuses parameters of another model, by the name of the first leaf that differs."""
        expected, given = _shapes(self), _shapes_of(params)
        for name in [*expected, *given]:
            if expected.get(name) != given.get(name):
                got, want = given.get(name, "not there"), expected.get(name, "no such leaf")
                raise ValueError(f"{self.name}: the parameter {name} is {got}, expected {want} (model {self!r}).")


def stack_blocks(params: Params) -> Params:
    """Parameters of an unrolled model (``scan=False``) as those of a scanned one."""
    return {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["blocks"])}


def unstack_blocks(params: Params) -> Params:
    """Parameters of a scanned model as those of an unrolled one."""
    return {**params, "blocks": _unstacked(params["blocks"], len(jax.tree.leaves(params["blocks"])[0]))}


def _unstacked(blocks: Any, layers: int) -> tuple[Any, ...]:
    return tuple(jax.tree.map(lambda leaf: leaf[i], blocks) for i in range(layers))  # noqa: B023


@functools.lru_cache(maxsize=64)
def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return _shapes_of(jax.eval_shape(model.init, jax.random.key(0), model.example)[0])


def _shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): jnp.shape(leaf) for path, leaf in leaves}


def _either(known: Any) -> str:
    *first, last = [repr(name) for name in known]
    return f"{', '.join(first)} or {last}"
