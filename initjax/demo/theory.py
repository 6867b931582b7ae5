"""What theory says of one initialization before any training, and what a few random networks show."""

import jax
import jax.numpy as jnp
import numpy as np

from initjax.demo.network import Setup
from initjax.demo.report import Diagram, Measured, Predicted, Series
from initjax.demo.verdict import DEPTH_SCALES, is_trainable
from initjax.trace.jaxpr import float64


def predict(setup: Setup, depth: int, width: int, images: np.ndarray) -> Predicted:
    """Phase and depth scales from mean-field theory; signal, gradients and kernel from the module as written."""
    from initjax import infinite, meanfield, spectrum

    point = meanfield.fixed_point(jnp.tanh, setup.sigma_w, setup.sigma_b)
    kernel = infinite.kernel_fn(setup.model(depth, width), images)(images)
    xi_grad, xi_c = float(point.xi_grad), float(point.xi_c)
    return Predicted(
        phase=str(point.phase),
        chi=float(point.chi_1),
        xi_grad=xi_grad,
        xi_c=xi_c,
        q=np.array([layer.q.mean() for layer in kernel.layers]),
        gradient=np.array([layer.gradient.mean() for layer in kernel.layers]),
        ntk_condition_number=float(spectrum.condition_number(kernel.ntk)),
        trainable=is_trainable(depth, xi_grad, xi_c),
    )


def measure(setup: Setup, depth: int, width: int, images: np.ndarray, draws: int, key: jax.Array, ntk_fn) -> Measured:
    """Signal, gradients and tangent kernel of `draws` random networks, as drawn by their initializers.

    `ntk_fn` is the empirical kernel of the network, whose initializers do not matter to it: one for all setups is
    compiled once.
    """
    from initjax import empirical, spectrum

    signal_key, kernel_key = jax.random.split(key)
    model = setup.model(depth, width)
    signals = empirical.measure(model, images, key=signal_key, seeds=draws)
    gradients = signals.gradient_samples.mean(axis=-1)
    conditions = []
    for one in jax.random.split(kernel_key, draws):
        params = model.init(one, images[:1])["params"]
        with float64():  # the smallest eigenvalues of a cold network lie below float32's rounding of the largest
            params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
            kernel = np.asarray(ntk_fn(params, np.asarray(images, np.float64)))
        conditions.append(np.log10(float(spectrum.condition_number(kernel))))
    return Measured(
        q=Series.over(signals.q_samples.mean(axis=-1)),
        log10_gradient=Series.over(np.log10(gradients / gradients[:, -1:])),
        log10_ntk_condition_number=Series.over(np.array(conditions)[:, None]).at(0),
    )


def diagram(points: int, depth: int, sigma_w: tuple[float, float], sigma_b: tuple[float, float]) -> Diagram:
    """The phase diagram of tanh, with the part in which networks of this depth should learn."""
    from initjax import meanfield

    weights, biases = np.linspace(*sigma_w, points), np.linspace(*sigma_b, points)
    found = meanfield.phase_diagram(jnp.tanh, weights, biases)
    chi = np.asarray(found.chi_1)
    # rates, 1 / xi, pass smoothly through zero on the critical line where depth scales are infinite
    rate = np.maximum(np.abs(np.log(chi)), 1 / np.asarray(found.xi_c))
    excess = np.where(chi < 1, -1, 1) * depth * rate / DEPTH_SCALES
    return Diagram(weights, biases, excess, found.critical_line[:, 0])
