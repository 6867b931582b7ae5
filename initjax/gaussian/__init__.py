"""Gaussian expectations of any elementwise activation, exact to rounding."""

from initjax.gaussian.activation import Activation as Activation
from initjax.gaussian.activation import as_activation as as_activation
from initjax.gaussian.api import dual as dual
from initjax.gaussian.api import dual_prime as dual_prime
from initjax.gaussian.api import gain as gain
from initjax.gaussian.api import mean as mean
from initjax.gaussian.api import moment as moment
from initjax.gaussian.api import moment_prime as moment_prime
from initjax.gaussian.dual import cross as cross
from initjax.gaussian.dual import pair as pair
from initjax.gaussian.expect import expect as expect
from initjax.gaussian.series import hermite as hermite

__all__ = [
    "Activation",
    "as_activation",
    "cross",
    "dual",
    "dual_prime",
    "expect",
    "gain",
    "hermite",
    "mean",
    "moment",
    "moment_prime",
]
