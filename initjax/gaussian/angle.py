"""The angle of two Gaussians, arctan2(s, c) with s = sin >= 0 and c = cos, in arithmetic that XLA can vectorise.

XLA calls the C library's atan2 entry by entry. This is arcsin by a rational function on |x| < 1/2, and by the half
angle outside. A rounded c costs its rounding over s, as it does in arctan2 of an s made from it. Coefficients: the fit
of Sun's fdlibm (e_asin.c, 1993), 1 ulp.
"""

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


def angle(xp, s, c):
    """arctan2(s, c), s >= 0, s^2 + c^2 = 1; with xp = numpy by its own arctan2."""
    return np.pi / 2 - _latitude(s, c) if xp is jnp else xp.arctan2(s, c)


def latitude(xp, s, c):
    """arctan2(c, s) = pi/2 - angle, with the digits of a small c."""
    return _latitude(s, c) if xp is jnp else xp.arctan2(c, s)


def _horner(coefficients, x):
    total = jnp.full_like(x, coefficients[0])
    for a in coefficients[1:]:
        total = total * x + a
    return total


@jax.custom_jvp
def _latitude(s, c):
    size = jnp.abs(c)
    near = size < 0.5
    z = jnp.where(near, c * c, (1 - size) * 0.5)
    t = jnp.where(near, c, jnp.sqrt(z))
    arcsin = t + t * (z * _horner(_P, z) / _horner(_Q, z))
    return jnp.where(near, arcsin, jnp.sign(c) * (np.pi / 2 - 2 * arcsin))


@_latitude.defjvp
def _latitude_jvp(primals, tangents):
    (s, c), (ds, dc) = primals, tangents
    return _latitude(s, c), (s * dc - c * ds) / (s * s + c * c)
