"""What theory says of one initialization before any training, and what a few random networks show."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.demo.network import Setup
from initjax.demo.report import Diagram, Measured, Predicted, Series
from initjax.demo.verdict import DEPTH_SCALES, is_trainable


def predict(setup: Setup, depth: int, width: int, images: np.ndarray) -> Predicted:
    """Phase, depth scales, signal, gradients and tangent kernel at infinite width.

    The images have |x|^2 / d = 1, so the first layer's pre-activations have second moment sigma_w^2 + sigma_b^2.
    """
    from initjax import infinite, meanfield, spectrum

    point = meanfield.fixed_point(jnp.tanh, setup.sigma_w, setup.sigma_b)
    first = setup.sigma_w**2 + setup.sigma_b**2
    signal = meanfield.propagate(jnp.tanh, setup.sigma_w, setup.sigma_b, depth - 1, q0=first)
    kernel = infinite.kernel_fn(setup.model(depth, width), images[:1])(images)
    xi_grad, xi_c = float(point.xi_grad), float(point.xi_c)
    return Predicted(
        phase=str(point.phase),
        chi=float(point.chi_1),
        xi_grad=xi_grad,
        xi_c=xi_c,
        q=np.asarray(signal.q),
        gradient=backward(np.asarray(signal.chi)[: depth - 1]),
        ntk_condition_number=float(spectrum.condition_number(np.asarray(kernel.ntk))),
        trainable=is_trainable(depth, xi_grad, xi_c),
    )


def backward(chi: np.ndarray) -> np.ndarray:
    """Gradient second moment at each hidden layer over that at the last: the product of the gains on the way back.

    The gradient that arrives at pre-activation l is multiplied by phi'(h^l)^2, so the last layer's own gain drops out.

    Examples
    --------
    >>> backward(np.array([0.5, 2.0, 3.0])).tolist()
    [1.0, 2.0, 1.0]
    """
    return np.cumprod(np.append(chi[:-1], 1.0)[::-1])[::-1]


def diagram(points: int, depth: int, sigma_w: tuple[float, float], sigma_b: tuple[float, float]) -> Diagram:
    """The phase diagram of tanh, with the part in which networks of this depth should learn."""
    from initjax import meanfield

    weights, biases = np.linspace(*sigma_w, points), np.linspace(*sigma_b, points)
    found = meanfield.phase_diagram(jnp.tanh, weights, biases)
    chi = np.asarray(found.chi_1)
    # rates, 1 / xi, pass smoothly through zero on the critical line where depth scales are infinite
    rate = np.maximum(np.abs(np.log(chi)), 1 / np.asarray(found.xi_c))
    excess = np.where(chi < 1, -1, 1) * depth * rate / DEPTH_SCALES
    return Diagram(weights, biases, excess, np.asarray(found.critical_line))
