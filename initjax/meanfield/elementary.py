r"""The layer maps of fully connected networks: dense, activation, dropout, normalization, residual.

Each is the infinite-width limit of one operation, on (q1, q2, k) and on a small change (chi, chi_k); see `state.py`.

Sources: dropout: Schoenholz et al. 2017 (arXiv:1611.01232), section 5. Residual: Yang and Schoenholz 2017
(arXiv:1712.08969). Layer and RMS normalization act on each input alone. Batch normalization: Yang et al. 2019
(arXiv:1902.08129), in the limit of a large batch all of whose pairs have one correlation.
"""

import functools
from typing import Any

import numpy as np

from initjax.errors import InputError, QuadratureError
from initjax.gaussian.activation import Activation as Elementwise
from initjax.gaussian.activation import as_activation
from initjax.gaussian.dual import cross
from initjax.gaussian.expect import expect
from initjax.gaussian.nodes import legendre, legendre_transform
from initjax.meanfield.fixed import check_sigma
from initjax.meanfield.layermap import LayerMap
from initjax.meanfield.state import Layer, State, check_layer, refuse_tracers, times
from initjax.meanfield.table import DEGREE, table_of

_FEW = 8  # pairs up to which a trajectory uses caches of its own


class Dense(Layer):
    """A dense layer with independent Gaussian weights: q -> sigma_w^2 q + sigma_b^2, Gaussian units of mean zero.

    Parameters
    ----------
    sigma_w, sigma_b : standard deviations >= 0: Var W = sigma_w^2 / fan_in, Var b = sigma_b^2.

    Raises
    ------
    InputError : negative, NaN or traced.

    Examples
    --------
    >>> import initjax as ij
    >>> print(ij.layers.Dense(2.0, 1.0).step(ij.layers.state(1.0, 0.5)).q1)
    5.0
    """

    def __init__(self, sigma_w=1.0, sigma_b=0.0):
        refuse_tracers("Dense", sigma_w, sigma_b)
        self.sigma_w, self.sigma_b = check_sigma(sigma_w, "sigma_w")[()], check_sigma(sigma_b, "sigma_b")[()]

    def step(self, state: State) -> State:
        vw, vb = self.sigma_w**2, self.sigma_b**2
        q1, q2 = vw * state.q1 + vb, vw * state.q2 + vb
        zero = np.zeros_like(q1)[()]
        pair = {} if state.k is None else {"k": vw * state.k + vb, "chi_k": times(state.chi_k, vw)}
        return state.replace(q1=q1, q2=q2, mean1=zero, mean2=zero, chi=vw * state.chi, gaussian=True, **pair)

    def __repr__(self) -> str:
        return f"Dense(sigma_w={self.sigma_w}, sigma_b={self.sigma_b})"


class Activation(Layer):
    """An elementwise activation of Gaussian units: q -> E[phi^2], k -> E[phi(u) phi(v)], chi -> chi E[phi'^2].

    Parameters
    ----------
    phi : elementwise JAX callable or `ij.Activation`.

    Raises
    ------
    NotElementwiseError : when built, if phi is not elementwise.
    InputError : when stepped, if the units that come in are not Gaussian.

    Accuracy
    --------
    1e-12 relative to E[phi^2].

    Examples
    --------
    >>> import jax, initjax as ij
    >>> after = ij.layers.Activation(jax.nn.relu).step(ij.layers.state(1.0, 0.0))
    >>> print(f"{after.q1:.6f} {after.k:.6f} {after.mean1:.6f}")  # 1/2, 1/(2 pi), 1/sqrt(2 pi)
    0.500000 0.159155 0.398942
    """

    def __init__(self, phi):
        self.phi: Elementwise = as_activation(phi)
        self._map = LayerMap(self.phi)

    def step(self, state: State) -> State:
        if not state.gaussian:
            raise InputError(
                f"Activation({self.phi.name}) follows a layer whose units are not Gaussian.",
                "Gaussian units: those of a state at the start, of Dense, or of their sums and normalizations.",
                "after an activation or dropout the units have another distribution, of which two moments do not "
                "determine E[phi^2].",
                "put a Dense layer between, or pass the composed function as one activation: "
                "ij.layers.Activation(lambda x: g(f(x))).",
            )
        act, table = self.phi, table_of(self.phi)
        q1, q2 = np.asarray(state.q1), np.asarray(state.q2)
        same = np.array_equal(q1, q2)
        at1 = table(np, q1)
        m2 = at1.m if same else table(np, q2).m
        mean1 = unit_mean(act, q1)
        out = {
            "q1": at1.m[()],
            "q2": m2[()],
            "mean1": mean1[()],
            "mean2": (mean1 if same else unit_mean(act, q2))[()],
            "chi": (state.chi * at1.d)[()],
            "gaussian": False,
        }
        if state.k is not None:
            k = np.asarray(state.k)
            equal = (k == q1) & (k == q2)  # the one-dimensional value, so that merged inputs stay merged
            m1, overlap, slope = np.asarray(at1.m), np.array(at1.m), np.array(at1.d)
            if not equal.all():
                rest = ~equal
                args = q1[rest], q2[rest], k[rest]
                bound = np.sqrt(m1[rest]) * np.sqrt(np.asarray(m2)[rest])
                if same and state.chi_k is None and rest.sum() <= _FEW and not act.jumps:
                    overlap[rest] = np.clip(self._deep(q1[rest], k[rest], m1[rest], at1.d[rest]), -bound, bound)
                else:
                    overlap[rest] = np.clip(cross(act, act, *args), -bound, bound)
                if state.chi_k is not None:
                    slope[rest] = cross(act.prime, act.prime, *args)
            out["k"], out["chi_k"] = overlap[()], times(state.chi_k, slope[()])
        return state.replace(**out)

    def _deep(self, q, k, moment, slope):
        """E[phi(u) phi(v)] with caches over log q, for trajectories whose q changes in every layer."""
        out = np.empty_like(q)
        for i in range(q.size):
            delta = 1 - k[i] / q[i]
            if delta <= 0.5:
                width = self._map.width(float(q[i]), float(moment[i]), float(slope[i]), np.array([max(delta, 0.0)]))[0]
                out[i] = moment[i] - q[i] * max(delta, 0.0) * width
            else:
                out[i] = self._map.overlap(float(q[i]), float(moment[i]), np.array([max(1 - delta, -1.0)]))[0]
        return out

    def __repr__(self) -> str:
        return f"Activation({self.phi.name})"


def unit_mean(act: Elementwise, q: np.ndarray) -> np.ndarray:
    """E[phi(sqrt(q) z)]; many q from piecewise polynomials in log q."""
    if _odd(act):
        return np.zeros_like(q)
    if q.size <= 8:
        return np.reshape(_mean(act, q), q.shape)
    x = 2 * np.log(np.maximum(q, 1e-20))  # cells of width 1/2; below, the limit q -> 0
    cell = np.floor(x).astype(int)
    out = np.empty(q.shape)
    for index in np.unique(cell):
        at = cell == index
        out[at] = np.polynomial.legendre.legval(2 * (x[at] - index) - 1, _mean_cell(act, int(index)))
    return out


def _mean(act, q):
    try:
        return np.asarray(expect(act, q))
    except QuadratureError:  # only normalizations and sums need it; there nan says so
        return np.full(np.shape(q), np.nan)


@functools.lru_cache(maxsize=20_000)
def _mean_cell(act: Elementwise, index: int) -> np.ndarray:
    nodes, _ = legendre(DEGREE)
    return _mean(act, np.exp((index + (nodes + 1) / 2) / 2)) @ legendre_transform(DEGREE)


@functools.lru_cache(maxsize=512)
def _odd(act: Elementwise) -> bool:
    x = np.linspace(0.03, 12.0, 97)
    return bool(np.array_equal(act.values(-x), -act.values(x)))


class Dropout(Layer):
    """Inverted dropout with independent masks for the two inputs: q -> q / keep, k -> k.

    Two copies of one input then differ: c = 1 is no fixed point, and the correlation depth xi_c is finite everywhere.

    Parameters
    ----------
    keep : probability in (0, 1] of keeping a unit, which is then divided by it.

    Raises
    ------
    InputError : keep outside (0, 1].

    Examples
    --------
    >>> import jax, initjax as ij
    >>> from initjax.layers import Activation, Dense, Dropout
    >>> block = Activation(jax.nn.relu) >> Dropout(keep=0.9) >> Dense(1.8**0.5)  # sigma_w^2 = 2 keep holds q
    >>> point = ij.layers.fixed_point(block)
    >>> print(f"{point.c:.5f} {point.chi_c:.4f}")
    0.62715 0.6442
    """

    def __init__(self, keep):
        refuse_tracers("Dropout", keep)
        value = np.asarray(keep)
        if value.dtype.kind not in "fiub" or not np.all((value > 0) & (value <= 1)):
            raise InputError(
                f"keep = {keep!r}.",
                "a probability of keeping a unit, 0 < keep <= 1.",
                "kept units are divided by it.",
                "Flax's nn.Dropout(rate) drops: pass keep = 1 - rate.",
            )
        self.keep = value.astype(np.float64)[()]

    def step(self, state: State) -> State:
        same = bool(np.all(self.keep == 1))
        return state.replace(
            q1=state.q1 / self.keep,
            q2=state.q2 / self.keep,
            chi=state.chi / self.keep,
            gaussian=state.gaussian and same,
        )

    def __repr__(self) -> str:
        return f"Dropout(keep={self.keep})"


class LayerNorm(Layer):
    """(h - mean h) / std h over the units of each input, so that q = 1.

    Examples
    --------
    >>> import jax, initjax as ij
    >>> from initjax.layers import Activation, Dense, LayerNorm
    >>> block = Activation(jax.nn.relu) >> Dense(3.0) >> LayerNorm()
    >>> print(f"{ij.layers.fixed_point(block).chi_1:.6f}")  # the weight scale drops out
    1.000000
    """

    centred = True

    def step(self, state: State) -> State:
        m1, m2 = (state.mean1, state.mean2) if self.centred else (0.0 * state.mean1, 0.0 * state.mean2)
        v1, v2 = state.q1 - m1 * m1, state.q2 - m2 * m2
        if np.any(v1 <= 0) or np.any(v2 <= 0):
            raise InputError(
                f"{self!r} got units with variance {np.min([np.min(v1), np.min(v2)]):.3g}.",
                "units that are not all equal.",
                "the normalization divides by their standard deviation.",
                "give the layer before it a positive sigma_w or sigma_b, or start from q > 0.",
            )
        one = np.ones_like(v1)[()]
        zero = np.zeros_like(v1)[()]
        pair = {}
        if state.k is not None:
            norm = np.where(v1 == v2, v1, np.sqrt(v1) * np.sqrt(v2))  # exactly 1 for merged inputs
            pair = {"k": ((state.k - m1 * m2) / norm)[()], "chi_k": times(state.chi_k, (1 / norm)[()])}
        return state.replace(
            q1=one,
            q2=one,
            mean1=zero if self.centred else state.mean1 / np.sqrt(v1),
            mean2=zero if self.centred else state.mean2 / np.sqrt(v2),
            chi=state.chi / v1,
            **pair,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class RMSNorm(LayerNorm):
    """h / rms h over the units of each input, so that q = 1; the mean stays.

    Examples
    --------
    >>> import initjax as ij
    >>> print(ij.layers.RMSNorm().step(ij.layers.state(4.0, 0.5)).k)
    0.5
    """

    centred = False


class BatchNorm(Layer):
    """Batch normalization in a large batch all of whose pairs have the state's correlation: q -> 1, c -> 0.

    The batch mean of a unit is its common part, of variance k, and its batch variance is q - k: gradients are divided
    by that. Between two such layers the weight scale cancels, and gradients grow by E[phi'^2] / Var(phi) >= 1.
    A batch of B instead of infinitely many adds a factor of about 1 + 1 / B for linear networks, (B - 2) / (B - 3).

    Raises
    ------
    InputError : when stepped, if the two inputs have different second moments: the batch is not symmetric.

    Examples
    --------
    >>> import jax, initjax as ij
    >>> from initjax.layers import Activation, BatchNorm, Dense
    >>> block = BatchNorm() >> Activation(jax.nn.relu) >> Dense(1.0)
    >>> print(f"{ij.layers.fixed_point(block).chi_1:.6f}")  # pi / (pi - 1)
    1.466942

    References
    ----------
    Yang et al. 2019 (arXiv:1902.08129), section 3.
    """

    def step(self, state: State) -> State:
        if not np.allclose(state.q1, state.q2, rtol=1e-9, atol=0):
            raise InputError(
                f"BatchNorm got inputs of second moments {np.ravel(state.q1)[0]:.6g} and {np.ravel(state.q2)[0]:.6g}.",
                "two inputs with equal second moments.",
                "its map is known for batches in which all inputs, and all pairs, look alike.",
                "start from one q for both inputs, for example ij.layers.state(q, c).",
            )
        one, zero = np.ones_like(state.q1)[()], np.zeros_like(state.q1)[()]
        if state.k is None:  # without the pair the batch variance is not known
            return state.replace(q1=one, q2=one, mean1=zero, mean2=zero, chi=state.chi * np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            chi = state.chi / (state.q1 - state.k)
        return state.replace(q1=one, q2=one, k=zero, mean1=zero, mean2=zero, chi=chi, chi_k=times(state.chi_k, 0.0))

    def __repr__(self) -> str:
        return "BatchNorm()"


class Residual(Layer):
    """skip * h + alpha * branch(h), for a branch with weights of its own: second moments add.

    Parameters
    ----------
    branch : Layer that contains a layer with weights (Dense, Convolution, Attention).
    alpha, skip : factors on the branch and on the skip connection.

    Raises
    ------
    InputError : the branch has no weights, so that it is not independent of its input; a factor is not finite.

    Examples
    --------
    >>> import jax, initjax as ij
    >>> from initjax.layers import Activation, Dense, Residual
    >>> block = Residual(Activation(jax.nn.relu) >> Dense(2**0.5), alpha=100**-0.5)
    >>> print(f"{ij.layers.propagate(block, depth=100).q[-1]:.4f}")  # (1 + 1/100)^100
    2.7048

    References
    ----------
    Yang and Schoenholz 2017 (arXiv:1712.08969), theorems 2, 3; Hayou et al. 2021 (arXiv:2010.12859) for alpha.
    """

    def __init__(self, branch: Any, alpha=1.0, skip=1.0):
        check_layer(branch, "Residual")
        refuse_tracers("Residual", alpha, skip)
        if not any(isinstance(part, Dense) or getattr(part, "has_weights", False) for part in branch.within()):
            raise InputError(
                f"Residual({branch!r}) has a branch without weights.",
                "a branch with at least one layer of independent weights.",
                "the sum of second moments holds for a branch that is uncorrelated with its input.",
                "add Dense to the branch; a function such as x + phi(x) is one activation: "
                "ij.layers.Activation(lambda x: x + phi(x)).",
            )
        for name, value in (("alpha", alpha), ("skip", skip)):
            if np.asarray(value).dtype.kind not in "fiub" or not np.all(np.isfinite(np.asarray(value))):
                raise InputError(
                    f"{name} = {value!r}.",
                    "a finite real number.",
                    "it multiplies one path of the residual block.",
                    "pass for example alpha = depth**-0.5.",
                )
        self.branch: Layer = branch
        self.alpha, self.skip = np.float64(alpha), np.float64(skip)

    def step(self, state: State) -> State:
        inner = self.branch.step(state)
        a, s = self.alpha, self.skip
        m1, m2 = s * state.mean1, s * state.mean2
        f1, f2 = a * inner.mean1, a * inner.mean2
        pair = {}
        if state.k is not None:
            pair = {"k": s * s * state.k + a * a * inner.k + m1 * f2 + f1 * m2}
            if state.chi_k is not None:
                pair["chi_k"] = s * s * state.chi_k + a * a * inner.chi_k
        return state.replace(
            q1=s * s * state.q1 + a * a * inner.q1 + 2 * m1 * f1,
            q2=s * s * state.q2 + a * a * inner.q2 + 2 * m2 * f2,
            mean1=m1 + f1,
            mean2=m2 + f2,
            chi=s * s * state.chi + a * a * inner.chi,
            gaussian=(state.gaussian or bool(s == 0)) and (inner.gaussian or bool(a == 0)),
            **pair,
        )

    def within(self) -> tuple[Layer, ...]:
        return (self, *self.branch.within())

    def __repr__(self) -> str:
        return f"Residual({self.branch!r}, alpha={self.alpha}, skip={self.skip})"
