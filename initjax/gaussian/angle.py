"""The angle of two Gaussians, arctan2(s, c) with s = sin >= 0 and c = cos, in arithmetic that XLA can vectorise.

XLA calls the C library's atan2 entry by entry. This is arcsin by a rational function on |x| < 1/2, and by the half
angle outside, where (1 - |c|) / 2 = s^2 / (2 (1 + |c|)) keeps the digits that a rounded c has lost. Coefficients: the
fit of Sun's fdlibm (e_asin.c, 1993), 1 ulp.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_P = (3.47933107596021167570e-05, 7.91534994289814532176e-04, -4.00555345006794114027e-02)
_P += (2.01212532134862925881e-01, -3.25565818622400915405e-01, 1.66666666666666657415e-01)
_Q = (
    7.70381505559019352791e-02,
    -6.88283971605453293030e-01,
    2.02094576023350569471e00,
    -2.40339491173441421878e00,
    1.0,
)


def angle(xp, s, c, rounded: bool = False):
    """arctan2(s, c), s >= 0, s^2 + c^2 = 1; with xp = numpy by its own arctan2.

    rounded : c carries rounding that s does not, so that 1 - |c| is to be had from s.
    """
    return np.arctan2(s, c) if xp is np else _angle(rounded, s, c) if xp is jnp else xp.arctan2(s, c)


def _horner(coefficients, x):
    total = jnp.full_like(x, coefficients[0])
    for a in coefficients[1:]:
        total = total * x + a
    return total


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _angle(rounded, s, c):
    size = jnp.abs(c)
    near = size < 0.5
    z = jnp.where(near, c * c, s * s / (2 * (1 + size)) if rounded else (1 - size) * 0.5)
    t = jnp.where(near, c, jnp.sqrt(z))
    arcsin = t + t * (z * _horner(_P, z) / _horner(_Q, z))
    half_pi = np.pi / 2
    return jnp.where(near, half_pi - arcsin, jnp.where(c > 0, 2 * arcsin, np.pi - 2 * arcsin))


@_angle.defjvp
def _angle_jvp(rounded, primals, tangents):
    (s, c), (ds, dc) = primals, tangents
    return _angle(rounded, s, c), (c * ds - s * dc) / (s * s + c * c)
