"""Which primitives act entry by entry, and their evaluation in float64.

Primitives that are not in the list (new ones appear with every JAX release) are tried out: on an array, and on its
entries one at a time.
"""

import functools

import jax.numpy as jnp
import numpy as np

from initjax.trace.inline import Equation
from initjax.trace.jaxpr import float64

_KNOWN = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp copysign cos cosh digamma div eq erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg "
    "nextafter not one_minus_square or pow rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor "
    "bitcast_convert_type shift_left shift_right_logical shift_right_arithmetic".split()
)
# these keep shapes without acting entry by entry, or are no functions of values: never tried out
_NEVER = frozenset("sort cumsum cumprod cummax cummin cumlogsumexp rev copy reduce_precision custom_lin".split())


def is_pointwise(equation: Equation, shapes: list[tuple[int, ...]], out_shape: tuple[int, ...]) -> bool:
    """Whether the equation's primitive acts entry by entry."""
    name = equation.name
    if name in _KNOWN:
        return True
    if name in _NEVER or not shapes or len(equation.outputs) != 1 or any(s not in ((), out_shape) for s in shapes):
        return False
    try:
        key = tuple(sorted((k, v) for k, v in equation.params.items()))
        return _tried(equation.primitive, key, len(shapes))
    except TypeError:  # parameters that cannot be hashed or ordered are not those of a pointwise function
        return False


@functools.cache
def _tried(primitive, params: tuple, count: int) -> bool:
    arrays = [np.array([0.31, -0.72, 1.43, 0.12]) + 0.1 * i for i in range(count)]
    try:
        with float64():
            whole = np.asarray(primitive.bind(*[jnp.asarray(a) for a in arrays], **dict(params)))
            rows = zip(*arrays, strict=True)
            alone = [np.asarray(primitive.bind(*[jnp.asarray(v) for v in row], **dict(params))) for row in rows]
    except Exception:
        return False
    return whole.shape == (4,) and np.array_equal(whole, np.stack(alone), equal_nan=True)


def evaluate(equation: Equation, arrays: list[np.ndarray]) -> np.ndarray:
    """Apply a pointwise primitive to equal-shaped float64 (or boolean) arrays, in float64."""
    with float64():
        return np.asarray(equation.primitive.bind(*[jnp.asarray(a) for a in arrays], **equation.params))
