"""What theory says of one initialization before any training, and what a few random networks show."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.demo.network import Setup
from initjax.demo.report import Diagram, Measured, Predicted, Series
from initjax.demo.verdict import is_trainable


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
    """Gradient second moment of each hidden layer over that of the last, from the gain of each: prod of chi between them.

    Examples
    --------
    >>> backward(np.array([0.5, 0.5, 2.0])).tolist()
    [1.0, 2.0, 1.0]
    """
    gains = np.append(chi[1:], 1.0)  # gain between layer l and layer l + 1 is that of layer l + 1's input
    return np.cumprod(gains[::-1])[::-1]


def diagram(points: int, depth: int, sigma_w: tuple[float, float], sigma_b: tuple[float, float]) -> Diagram:
    """The phase diagram of tanh, with the part in which networks of this depth should learn."""
    from initjax import meanfield

    weights, biases = np.linspace(*sigma_w, points), np.linspace(*sigma_b, points)
    found = meanfield.phase_diagram(jnp.tanh, weights, biases)
    chi = np.asarray(found.chi_1)
    with np.errstate(divide="ignore"):
        xi_grad = -1 / np.log(chi)
    trainable = np.vectorize(is_trainable, excluded={0}, otypes=[bool])(depth, xi_grad, np.asarray(found.xi_c))
    return Diagram(weights, biases, chi, trainable, np.asarray(found.critical_line))
