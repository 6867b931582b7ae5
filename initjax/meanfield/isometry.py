r"""Singular values of the input-output Jacobian of a deep network at its fixed point: dynamical isometry, or not.

J = prod_l D_l W_l, D = diag phi'(h). With mu_k = E[phi'^(2k)] at q the eigenvalues of J J^T have mean chi_1^L, chi_1 =
sigma_w^2 mu_1, and variance chi_1^(2L) L (mu_2 / mu_1^2 - 1 - s), s = -1 for Gaussian and 0 for orthogonal W: He and
Xavier fix the mean alone. freeprob.py gives the whole density.

Sources: Pennington, Schoenholz, Ganguli 2017 (arXiv:1711.04735), eqs. 17 to 22, and 2018 (arXiv:1802.09979).
"""

from typing import Any

import numpy as np

from initjax.errors import InputError, QuadratureError
from initjax.gaussian.activation import Activation, as_activation
from initjax.gaussian.expect import check_q, gaussian_rule, host_rule
from initjax.gaussian.nodes import legendre
from initjax.meanfield.finite import check_widths
from initjax.meanfield.fixed import check_sigma, fixed_point
from initjax.meanfield.freeprob import Curve, Law, density_at, edges, followed, traced
from initjax.meanfield.results import result
from initjax.meanfield.table import ramp

_FEW = 16  # distinct values of phi'^2 up to which its law is a sum of atoms
_MERGED = 1e-12
_BAD = 1e-8  # residual of Newton from which a node is not believed
_MISSING = 0.03  # mass that may lie below the smallest resolved eigenvalue
_ORDER = 24  # nodes a panel for the law of phi'^2: it must look smooth where w comes near it
_DECAY = 21.0  # mass at zero falls like lambda^(1 / (L + 1)): nine digits


@result
class JacobianSpectrum:
    """Law of the eigenvalues of J J^T, the squared singular values of the Jacobian; batch shape first.

    Attributes
    ----------
    q : pre-activation second moment at which phi' is taken.
    mean, variance : moments of an eigenvalue, in closed form.
    edge : the largest eigenvalue.
    zero, top : probability mass at 0, and at `edge`; the rest is continuous.
    below : mass between 0 and the smallest eigenvalue that was resolved: a smooth phi' that comes near 0 (tanh, sin)
        has a tail of small eigenvalues. Sums over `mass` miss at most `below` times that eigenvalue.
    eigenvalue, density : (..., points), largest first; the nodes crowd where the density varies.
    mass : (..., points), so that sum(mass * f(eigenvalue)) is the integral of f over the continuous part.
    log_eigenvalue : ln of the nodes, where they underflow.
    """

    q: Any
    mean: Any
    variance: Any
    edge: Any
    zero: Any
    top: Any
    below: Any
    eigenvalue: Any
    density: Any
    mass: Any
    log_eigenvalue: Any


def jacobian_spectrum(phi, sigma_w, sigma_b=0.0, depth=1, weights="gaussian", *, q=None, points=512, widths=None):
    """The density of squared singular values of a random network's Jacobian, in the limit of infinite width.

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.
    sigma_w, sigma_b : standard deviations >= 0 (orthogonal: W = sigma_w Q); they broadcast with `depth`.
    depth : number of layers L >= 1.
    weights : "gaussian" or "orthogonal".
    q : pre-activation second moment; None (default): the fixed point that the network tends to.
    points : nodes of the density, 16 to 4096.
    widths : n_0 .. n_L of the network at hand, to be sure that this law is its own: layers of one width.

    Returns
    -------
    JacobianSpectrum.

    Raises
    ------
    InputError : unknown `weights`, depth < 1, a variance that diverges (pass q), phi' = 0 everywhere; depth 1 with
        orthogonal weights and a smooth phi, whose spectrum is that of sigma_w^2 phi'(h)^2 itself; `widths` that differ
        (orthogonal weights with fan_out < fan_in), or are not depth + 1 positive integers.
    QuadratureError : E[phi'^4] is infinite; a density that could not be followed.

    Accuracy
    --------
    mean, variance, edge: 1e-11 relative. Density and sums over `mass` 1e-9, up to what is `below`; 1e-7 where arg z
    does not grow along the support (leaky relu) or an atom sits at the top.

    Examples
    --------
    >>> import jax, numpy as np, initjax as ij
    >>> he = ij.jacobian_spectrum(jax.nn.relu, np.sqrt(2.0), depth=4)
    >>> print(f"{he.mean:.6f} {he.variance:.6f} {he.edge:.4f} {he.zero:.2f} {he.mass.sum():.6f}")
    1.000000 8.000000 21.8582 0.50 0.500000

    References
    ----------
    Pennington, Schoenholz, Ganguli 2017 (arXiv:1711.04735), eqs. 17, 22; 2018 (arXiv:1802.09979), section 4.
    """
    act = as_activation(phi)
    if weights not in ("gaussian", "orthogonal"):
        raise InputError(
            f"weights = {weights!r}.",
            '"gaussian" or "orthogonal".',
            "the law of W W^T enters the spectrum.",
            'use "orthogonal" for ij.initializers.orthogonal, "gaussian" for every i.i.d. initializer.',
        )
    if not 16 <= int(points) <= 4096:
        raise InputError(f"points = {points}.", "16 to 4096.", "they are the nodes of the density.", "use 512.")
    if widths is not None:
        _check_square(widths, depth, weights)
    w, b = check_sigma(sigma_w, "sigma_w"), check_sigma(sigma_b, "sigma_b")
    w, b, depth = np.broadcast_arrays(w, b, _check_depth(depth))
    shape, w, depth = w.shape, w.ravel(), depth.ravel()
    q = np.broadcast_to(_settled(act, w, b.ravel()) if q is None else check_q(q), w.shape).astype(np.float64)
    _check_moments(act, q)
    x, weight = _slopes(act, q)
    law = Law(x, weight, 2 * np.log(w), depth, np.full(w.shape, float(weights == "orthogonal")))
    mu_1, mu_2 = (np.sum(weight * x**k, axis=1) for k in (1, 2))
    _check_slope(act, w, mu_1)
    chi = w * w * mu_1
    spread = depth * (mu_2 / mu_1**2 - 1 + (1 - law.orthogonal))
    curve, log_edge, zero, top = _curves(act, law, spread, points)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        eigenvalue = np.exp(curve.log_eigenvalue)
        density = np.where(curve.scaled_density == 0, 0.0, curve.scaled_density / eigenvalue)
        mean, edge = chi**depth, np.exp(log_edge)
    below = np.maximum(1 - zero - top - curve.mass.sum(axis=1), 0.0)
    scalars = [v.reshape(shape)[()] for v in (q, mean, np.maximum(spread, 0.0) * mean**2, edge, zero, top, below)]
    grids = [v.reshape(*shape, points) for v in (eigenvalue, density, curve.mass, curve.log_eigenvalue)]
    return JacobianSpectrum(*scalars, *grids)


def _check_square(widths, depth, weights: str) -> None:
    n = check_widths(widths)
    if np.size(depth) != 1 or n.size != int(np.max(depth)) + 1:
        raise InputError(
            f"{n.size} widths and depth = {depth}.",
            "depth + 1 widths, those of the input and of every layer, with one depth.",
            "layer l maps n_(l-1) values to n_l.",
            "give [n_0, ..., n_L], or leave widths out.",
        )
    narrows = np.flatnonzero(n[1:] < n[:-1])
    if weights == "orthogonal" and narrows.size:
        at = int(narrows[0])
        raise InputError(
            f"orthogonal weights with fan_out = {n[at + 1]:g} < fan_in = {n[at]:g} in layer {at + 1}.",
            "square layers, widths that are all equal.",
            f"such a W has orthonormal rows only: it maps {n[at] - n[at + 1]:g} directions to zero, and no W^T W = 1.",
            "measure this network with ij.measured_jacobian; ij.initializers.scaled_orthogonal keeps its mean energy.",
        )
    if np.any(n != n[0]):
        raise InputError(
            f"widths {n.astype(int).tolist()}.",
            "layers of one width.",
            "the law of W W^T depends on fan_out / fan_in; this one is of square matrices.",
            "measure this network with ij.measured_jacobian.",
        )


def _check_depth(depth) -> np.ndarray:
    value = np.asarray(depth, dtype=np.float64)
    if np.any(~(value >= 1)) or np.any(value != np.floor(value)):
        raise InputError(
            f"depth = {depth}.",
            "whole numbers >= 1.",
            "it counts the layers of the Jacobian.",
            "pass the number of layers.",
        )
    return value


def _settled(act, w, b) -> np.ndarray:
    if ramp(act) is not None:
        return np.ones_like(w)  # phi' does not depend on the variance
    q = np.asarray(fixed_point(act, w, b).q)
    if not np.all(np.isfinite(q)):
        at = int(np.argmin(np.isfinite(q)))
        raise InputError(
            f"{act.name} at sigma_w = {w[at]:g}, sigma_b = {b[at]:g}, whose variance diverges.",
            "a network with a finite fixed point, or an explicit q.",
            "the law of phi' is needed at some variance.",
            "pass q, or a smaller sigma_w (ij.critical).",
        )
    return q


def _check_slope(act, w, mu_1) -> None:
    if np.any(mu_1 <= 0) or np.any(w <= 0):
        raise InputError(
            f"{act.name} with sigma_w = {w.min():g} and E[phi'^2] = {mu_1.min():g}.",
            "sigma_w > 0 and an activation with a slope.",
            "otherwise the Jacobian is zero.",
            "use another activation or weight scale.",
        )


def _check_moments(act: Activation, q: np.ndarray) -> None:
    """Refuse activations without a mu_2: the spectrum then has no variance, and quadrature would make one up."""
    try:
        host_rule(act, lambda u, f, slope: [slope**2, slope**4], np.unique(q), 2)
    except QuadratureError as error:
        raise QuadratureError(
            f"mu_2 = E[phi'^4] of {act.name}: {error.given}",
            "activations for which E[phi'^2] and E[phi'^4] are finite.",
            "the variance of the spectrum is L (mu_2 / mu_1^2 - 1 - s); a slope that is infinite at a point, or grows "
            "too fast, has none.",
            "bound the slope (ij.Activation of a smoothed function), or use a smaller q.",
        ) from error


def _slopes(act: Activation, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of phi'^2 and their probabilities at each q: (len(q), k)."""
    u, weight, _ = gaussian_rule(act, np.zeros_like(q), q, _ORDER)
    x = act.values_slopes(u)[1] ** 2
    weight = weight / weight.sum(axis=1, keepdims=True)
    scale = max(float(x.max()), 1e-300)
    values = np.unique(np.round(x[weight > 1e-25] / scale, 11))
    values = values[np.concatenate([[True], np.diff(values) > 1e-9])]
    if values.size <= _FEW:  # piecewise linear
        nearest = np.abs(x[..., None] / scale - values).argmin(axis=-1)
        counted = np.stack([np.sum(np.where(nearest == k, weight, 0.0), axis=1) for k in range(values.size)], axis=1)
        return np.broadcast_to(values * scale, counted.shape).copy(), counted
    half = u.shape[1] // 2
    if np.allclose(x[:, :half], x[:, : half - 1 if u.shape[1] % 2 == 0 else half : -1], rtol=1e-12, atol=0):
        x, weight = x[:, :half], 2 * weight[:, :half]  # an even slope: half the nodes
    return x, weight


def _curves(act, law: Law, spread, points):
    count = spread.size
    w, log_edge, found = edges(law)
    isometric = spread < 1e-14 * law.depth
    alone = (law.depth == 1) & (law.orthogonal == 1) & (law.x.shape[1] > _FEW)
    if alone.any():
        raise InputError(
            f"depth = 1 with orthogonal weights for {act.name}.",
            "depth >= 2.",
            "the eigenvalues of one layer are sigma_w^2 phi'(h)^2 themselves; no free product smooths them.",
            "use ij.gaussian expectations of functions of phi', or a larger depth.",
        )
    top = np.zeros(count)
    largest = law.x.max(axis=1)
    share = np.sum(np.where(law.x >= largest[:, None] * (1 - _MERGED), law.weight, 0.0), axis=1)
    atom = ~found & (law.orthogonal == 1)
    top[atom] = np.maximum(0.0, 1 - law.depth[atom] * (1 - share[atom]))
    log_edge = np.where(atom, law.depth * (law.log_variance + np.log(largest)), log_edge)
    curve = _resolved(traced(law, np.where(found, w, 2 * largest), points))
    zero = np.sum(np.where(law.x <= _MERGED * largest[:, None], law.weight, 0.0), axis=1)
    good = found & (np.abs(curve.mass.sum(axis=1) + zero - 1) < _MISSING)
    for i in np.flatnonzero(~good):
        row = Law(*(v[i : i + 1] for v in law))
        if isometric[i]:
            new = _nothing(log_edge[i], points)
        else:
            edge = (w[i : i + 1], log_edge[i : i + 1]) if found[i] else None
            new = _followed(act, row, float(log_edge[i]), edge, 1 - zero[i] - top[i], points)
        for target, value in zip(curve, new, strict=True):
            target[i] = value
    return curve, log_edge, zero, np.where(isometric, 1.0, top)


def _resolved(curve: Curve) -> Curve:
    """The curve down to the first node at which it was lost: beyond, w runs into the nodes of phi'^2 near 0."""
    with np.errstate(invalid="ignore"):
        lost = np.logical_or.accumulate(~(curve.residual < _BAD), axis=1)
    log_eigenvalue, scaled, mass = (np.where(lost, v, u) for v, u in zip((-np.inf, 0.0, 0.0), curve[:3], strict=True))
    return Curve(log_eigenvalue, scaled, mass, np.where(lost, 0.0, curve.residual))


def _nothing(log_edge, points) -> Curve:
    zeros = np.zeros(points)
    return Curve(np.full(points, log_edge), zeros, zeros, zeros)


def _followed(act, row: Law, log_edge: float, edge, expected: float, points: int) -> Curve:
    """One density at given eigenvalues, between its edges in log lambda."""
    nodes, weights = legendre(points)
    if edge is None:  # an atom at the top: the continuous part ends somewhere below
        log_edge = _last(row, log_edge)
    positive = row.orthogonal[0] == 1 and row.x.min() > 1e-8 * row.x.max()
    inverse = Law(1 / np.maximum(row.x, 1e-300), row.weight, -row.log_variance, row.depth, row.orthogonal)
    _, log_lowest, ends = edges(inverse)  # J^-1 is a product of the same kind
    if positive and ends[0]:
        low = -float(log_lowest[0])
        angle = np.pi * (nodes + 1) / 2
        s = (log_edge + low) / 2 + (log_edge - low) / 2 * np.cos(angle)
        jacobian = (log_edge - low) / 2 * np.sin(angle) * np.pi / 2
    else:
        reach = _DECAY * (float(row.depth[0]) + 1)
        u = (nodes + 1) / 2
        s, jacobian = log_edge - reach * u**2, reach * u
    scaled, residual = followed(row, s, edge)
    curve = _resolved(Curve(*(v[None] for v in (s, scaled, scaled * jacobian * weights, residual))))
    if not -1e-3 < expected - curve.mass.sum() < _MISSING:
        raise QuadratureError(
            f"the Jacobian spectrum of {act.name} at depth {row.depth[0]:g}: mass {curve.mass.sum():.4g} instead of "
            f"{expected:.4g} was resolved.",
            "spectra of one band.",
            "the continuation of the density met more than one band, or an edge it could not resolve.",
            "the closed-form mean and variance hold all the same; measure this spectrum at finite width.",
        )
    return Curve(*(v[0] for v in curve))


def _last(row: Law, log_top: float) -> float:
    """The largest log lambda below an atom at which there is a continuous density."""
    low, high = log_top - 20.0, log_top
    for _ in range(6):
        s = np.linspace(high, low, 66)[1:-1]
        density, residual = density_at(row, s)
        there = np.flatnonzero((density > 1e-7) & (residual < _BAD))
        if not there.size:
            break
        low, high = float(s[there[0]]), float(s[there[0] - 1]) if there[0] else high
    return low


__all__ = ["JacobianSpectrum", "jacobian_spectrum"]
