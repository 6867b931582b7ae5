"""Phase diagrams: the fixed point of every (sigma_w, sigma_b) of a grid, with the critical line."""

import dataclasses

import jax
import numpy as np

from initjax.errors import InputError
from initjax.gaussian.activation import as_activation
from initjax.gaussian.expect import check_q
from initjax.meanfield.chaos import one_by_one
from initjax.meanfield.criticality import primary_arrays
from initjax.meanfield.fixed import check_sigma, depth_scale, variance_part, without_attractor
from initjax.meanfield.results import result
from initjax.meanfield.sweep import sweep_correlation
from initjax.trace.jaxpr import is_traced

_TABLE_FROM = 200  # chaotic points from which a table of the correlation map pays


@result
class PhaseDiagram:
    """Fixed points on a grid of (sigma_w, sigma_b); fields as in FixedPoint.

    Attributes
    ----------
    sigma_w, sigma_b : the grid, of the shape of every other field.
    q, c, chi_1, chi_q, chi_c : fixed point and slopes.
    xi_q, xi_c, xi_grad : depth scales in layers.
    phase : array of "ordered", "critical", "chaotic", "unbounded".
    critical_line : (k, 3) rows (sigma_w, sigma_b, stable) for the sigma_b of the grid; nan where none exists.
    """

    sigma_w: np.ndarray
    sigma_b: np.ndarray
    q: np.ndarray
    c: np.ndarray
    chi_1: np.ndarray
    chi_q: np.ndarray
    chi_c: np.ndarray
    xi_q: np.ndarray
    xi_c: np.ndarray
    xi_grad: np.ndarray
    critical_line: np.ndarray
    phase: np.ndarray

    def __getitem__(self, index) -> "PhaseDiagram":
        """The diagram of one activation of a sweep over activations, or any part along the leading axis."""
        return jax.tree.map(lambda leaf: leaf[index], self)._with_phase(self.phase[index])

    def _with_phase(self, phase) -> "PhaseDiagram":
        return dataclasses.replace(self, phase=phase)

    def plot(self, ax=None):
        """Draw the phases, the critical line (unstable part dashed) and contours of the correlation depth scale.

        Parameters
        ----------
        ax : matplotlib Axes, or None for a new figure.

        Returns
        -------
        The Axes. Needs matplotlib (extra "plots").

        Raises
        ------
        InputError : the diagram is not a two-dimensional grid.
        """
        from initjax.meanfield.draw import draw_diagram

        return draw_diagram(self, ax)


def phase_diagram(phi, sigma_w, sigma_b, q0=1.0) -> PhaseDiagram:
    """The phase, fixed point and depth scales at every point of a (sigma_w, sigma_b) grid.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`, or a list of them (a sweep over parameters of the activation):
        every field then has a leading axis, and `diagram[i]` is the diagram of the i-th.
    sigma_w, sigma_b : standard deviations >= 0. Two one-dimensional arrays span a grid, (len(sigma_w), len(sigma_b));
        anything else broadcasts.
    q0 : second moment of the first pre-activations, where several fixed points attract.

    Returns
    -------
    PhaseDiagram.

    Raises
    ------
    InputError : negative, complex, NaN, infinite or traced input; phi not elementwise.

    Accuracy
    --------
    q, chi 1e-11 relative; c 1e-8.

    Examples
    --------
    >>> import jax.numpy as jnp, numpy as np, initjax as ij
    >>> diagram = ij.phase_diagram(jnp.tanh, np.linspace(0.5, 2.5, 5), np.linspace(0.0, 0.4, 3))
    >>> print(diagram.phase[:, 0], diagram.q.shape)
    ['ordered' 'critical' 'chaotic' 'chaotic' 'chaotic'] (5, 3)

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), figure 1; Schoenholz et al. 2017 (arXiv:1611.01232), figures 1-2.
    """
    if isinstance(phi, (list, tuple)):
        return _sweep_over_activations(phi, sigma_w, sigma_b, q0)
    act = as_activation(phi)
    if is_traced(sigma_w, sigma_b, q0):
        raise InputError(
            "phase_diagram got a traced value.",
            "concrete arrays (also inside a jitted function).",
            "a diagram holds phases, which are text.",
            "ij.fixed_point accepts tracers and is differentiable.",
        )
    w, b = check_sigma(sigma_w, "sigma_w"), check_sigma(sigma_b, "sigma_b")
    line_b = np.unique(b)
    if w.ndim == 1 and b.ndim == 1:
        w, b = w[:, None], b[None, :]
    w, b, q0 = np.broadcast_arrays(w, b, check_q(q0, "q0"))
    point = variance_part(act, w.ravel(), b.ravel(), q0.ravel())
    c, chi_c = np.ones(w.size), np.array(point["chi_1"], copy=True)
    chaotic = (point["phase"] == "chaotic") & (point["q"] > 0)
    if chaotic.any():
        c[chaotic], chi_c[chaotic] = _chaotic(
            act, *(v[chaotic] for v in (point["q"], point["m"], w.ravel(), b.ravel()))
        )
    c, chi_c = without_attractor(point, c, chi_c)
    critical = point["phase"] == "critical"
    shaped = lambda v: np.asarray(v).reshape(w.shape)  # noqa: E731
    return PhaseDiagram(
        sigma_w=w.copy(),
        sigma_b=b.copy(),
        q=shaped(point["q"]),
        c=shaped(c),
        chi_1=shaped(point["chi_1"]),
        chi_q=shaped(point["chi_q"]),
        chi_c=shaped(chi_c),
        xi_q=shaped(np.where(np.isfinite(point["q"]), depth_scale(point["chi_q"]), np.nan)),
        xi_c=shaped(np.where(critical & np.isfinite(c), np.inf, depth_scale(chi_c))),
        xi_grad=shaped(np.where(critical, np.inf, depth_scale(point["chi_1"]))),
        critical_line=_line(act, line_b),
        phase=shaped(point["phase"]),
    )


def _sweep_over_activations(phis, sigma_w, sigma_b, q0) -> PhaseDiagram:
    if not phis:
        raise InputError(
            "phase_diagram got an empty list of activations.",
            "one activation, or a list of at least one.",
            "an empty sweep has no shape.",
            "ij.phase_diagram([partial(jax.nn.leaky_relu, negative_slope=a) for a in slopes], sigma_w, sigma_b).",
        )
    each = [phase_diagram(phi, sigma_w, sigma_b, q0) for phi in phis]
    fields = {f.name: np.stack([getattr(d, f.name) for d in each]) for f in dataclasses.fields(PhaseDiagram)}
    return PhaseDiagram(**fields)


def _chaotic(act, q, moment, w, b) -> np.ndarray:
    if q.size >= _TABLE_FROM:
        found = sweep_correlation(act, q, w * w)
        if found is not None:
            return found
    return one_by_one(act, q, moment, w * w, b * b)


def _line(act, sigma_b: np.ndarray) -> np.ndarray:
    fields = primary_arrays(act, sigma_b)
    stable = np.where(fields["kind"] == "none", np.nan, fields["stable"].astype(float))
    return np.stack([fields["sigma_w"], sigma_b, stable], axis=1)
