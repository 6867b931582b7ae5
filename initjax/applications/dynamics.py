r"""Whether another initialization changes what a network learns, or only how fast: kernels and trajectories compared.

At infinite width gradient descent on the squared error leads to f(x*) = f_0(x*) + Theta_* Theta^-1 (y - f_0), in the
mean over initializations Theta_* Theta^-1 y. If two initializations have proportional tangent kernels, mean solution
and condition number are the same and only time is rescaled. That is so for homogeneous networks without biases (relu):
in the NTK parameterization Theta is proportional to the product of all sigma_w^2, He = 2^L Xavier for square layers.
With biases, or tanh, kernels change their shape and solutions differ.

Sources: Jacot et al. 2018 (arXiv:1806.07572), Lee et al. 2019 (arXiv:1902.06720).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from initjax.applications.models import check_positive, drawn, fans, matrices, with_variances
from initjax.errors import InputError
from initjax.infinite.kernels import kernel_fn

SCHEMES: dict[str, Callable[[int, int], float]] = {
    "xavier": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "he": lambda fan_in, fan_out: 2 / fan_in,
    "lecun": lambda fan_in, fan_out: 1 / fan_in,
}


@dataclasses.dataclass(frozen=True)
class SchemeDynamics:
    """One initialization of a network of infinite width on a training set of N examples.

    Attributes
    ----------
    variances : leaf path -> variance of its entries.
    nngp, ntk : (N, N).
    condition_number : of the ntk.
    max_learning_rate : largest stable rate of full-batch descent on 1/(2N) sum (f - y)^2.
    loss : (T,), expected training loss at the times of the comparison, from f_0 drawn by `nngp`.
    solution : (M,) or (M, k), converged mean outputs on the test inputs; None without test inputs.
    """

    variances: dict[str, float]
    nngp: np.ndarray = dataclasses.field(repr=False)
    ntk: np.ndarray = dataclasses.field(repr=False)
    condition_number: float
    max_learning_rate: float
    loss: np.ndarray = dataclasses.field(repr=False)
    solution: Any = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several initializations of one model, the first one as reference. Made by `compare`.

    Attributes
    ----------
    schemes : name -> `SchemeDynamics`.
    times : (T,), steps of gradient descent.
    learning_rate : the same for all.
    ratio : name -> (smallest, largest) entrywise ratio of its tangent kernel to the reference's, where that is not 0.
    rescaling : name -> whether the kernels are proportional (to 1e-9): then only time is rescaled, by `factor`.
    factor : name -> ratio of the traces.
    difference : name -> relative distance of the converged mean test outputs from the reference's; nan without test
        inputs.
    """

    schemes: dict[str, SchemeDynamics]
    times: np.ndarray
    learning_rate: float
    ratio: dict[str, tuple[float, float]]
    rescaling: dict[str, bool]
    factor: dict[str, float]
    difference: dict[str, float]


def compare(
    model: Any,
    schemes: Any,
    x: Any,
    y: Any,
    *,
    x_test: Any = None,
    times: Any = None,
    learning_rate: float | None = None,
    parameterization: str = "ntk",
    apply_kwargs: dict | None = None,
) -> Comparison:
    r"""Tangent kernels, training curves and converged solutions of one model under several initializations.

    Parameters
    ----------
    model : linen module, nnx factory or pair. Its matrices are drawn anew; biases and the rest keep their initializers.
    schemes : names among "xavier" (2/(fan_in + fan_out)), "he" (2/fan_in), "lecun" (1/fan_in) and "critical" (lecun
        for the first layer, then chi = 1 in every layer, on the inputs); or {name: name, function (fan_in, fan_out) ->
        variance, or number sigma_w^2 over fan_in}.
    x, y : training inputs (N, ...) and targets (N,) or (N, k).
    x_test : test inputs (M, ...), or None.
    times : steps at which the loss is given; None for 0, 1, 2, 5, 10, ... 10000.
    learning_rate : the same for all; None for half of the smallest largest stable one.
    parameterization : "ntk" or "standard", as in `ij.kernel_fn`. In "standard", each leaf's kernel has the product of
        the *other* variances, so that proportional kernels need all layers rescaled alike.
    apply_kwargs : further arguments of every call.

    Returns
    -------
    Comparison.

    Raises
    ------
    InputError : fewer than two schemes, an unknown one, targets that do not fit.
    UnsupportedLayerError : a layer outside the exact theory.

    Warns
    -----
    UserWarning : a learning rate above the largest stable one of some scheme.

    Accuracy
    --------
    Kernels 1e-12; solutions by that times the condition number. A network of width w differs by O(1/sqrt(w)).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from flax import linen as nn
    >>> from initjax.applications import dynamics
    >>> layers = [p for _ in range(2) for p in (nn.Dense(8, use_bias=False), nn.relu)]
    >>> model = nn.Sequential([*layers, nn.Dense(1, use_bias=False)])
    >>> x = np.random.default_rng(0).standard_normal((4, 8))
    >>> found = dynamics.compare(model, ("lecun", "he"), x, x[:, 0])
    >>> print(found.rescaling["he"], round(found.factor["he"], 9))  # 2^3
    True 8.0
    """
    named = _named(schemes)
    functional = drawn(model, x, apply_kwargs)
    x, y = np.asarray(x), np.asarray(y, np.float64)
    if y.ndim not in (1, 2) or len(y) != len(x) or not np.isfinite(y).all():
        raise InputError(
            f"targets of shape {y.shape} for {len(x)} inputs",
            "finite targets (N,) or (N, k)",
            "each output of the network follows the same kernel",
            "flatten further axes of y",
        )
    if times is None:
        times = np.unique([0, *(m * 10**e for e in range(4) for m in (1, 2, 5)), 10_000])
    kernels = {}
    names = functional.leaf_names
    for name, scheme in named.items():
        variances = _variances(functional, scheme, x, parameterization)
        kernel = kernel_fn(with_variances(functional, variances), x, parameterization=parameterization)
        own = kernel(x, get=("nngp", "ntk"))
        across = None if x_test is None else kernel(np.asarray(x_test), x, get=("ntk",)).ntk
        kernels[name] = {names[i]: v for i, v in variances.items()}, own.nngp, own.ntk, across
    from initjax.spectrum import condition_number, max_learning_rate, trajectory

    limits = {name: float(max_learning_rate(ntk, n=len(x))) for name, (_, _, ntk, _) in kernels.items()}
    if learning_rate is None:
        learning_rate = min(limits.values()) / 2
    check_positive(learning_rate, "learning_rate", "it is that of gradient descent")
    found = {}
    for name, (variances, nngp, ntk, across) in kernels.items():
        curve = trajectory(ntk, y, times, learning_rate=learning_rate, n=len(x), nngp=nngp)
        solution = None if across is None else across @ np.linalg.solve(ntk, y)
        condition = float(condition_number(ntk))
        found[name] = SchemeDynamics(variances, nngp, ntk, condition, limits[name], curve.loss, solution)
    first = next(iter(found.values()))
    size = np.abs(first.ntk).max()
    here = np.abs(first.ntk) > 1e-12 * size
    ratios = {name: one.ntk[here] / first.ntk[here] for name, one in found.items()}
    factor = {name: float(np.trace(one.ntk) / np.trace(first.ntk)) for name, one in found.items()}
    gap = {
        name: np.abs(one.ntk - factor[name] * first.ntk).max() / (factor[name] * size) for name, one in found.items()
    }

    def distance(one: SchemeDynamics) -> float:
        if one.solution is None:
            return float("nan")
        return float(np.linalg.norm(one.solution - first.solution) / np.linalg.norm(first.solution))

    return Comparison(
        found,
        np.asarray(times),
        float(learning_rate),
        {name: (float(r.min()), float(r.max())) for name, r in ratios.items()},
        {name: bool(value < 1e-9) for name, value in gap.items()},
        factor,
        {name: distance(one) for name, one in found.items()},
    )


def _named(schemes: Any) -> dict[str, Any]:
    named = dict(schemes) if isinstance(schemes, dict) else {s: s for s in schemes if isinstance(s, str)}
    if len(named) < 2 or not isinstance(schemes, dict) and len(named) != len(tuple(schemes)):
        raise InputError(
            f"schemes={schemes!r}",
            "two or more different names, or {name: scheme}",
            "they are compared with the first one",
            'schemes=("xavier", "he", "critical")',
        )
    for name, scheme in named.items():
        known = isinstance(scheme, str) and scheme in (*SCHEMES, "critical")
        number = isinstance(scheme, int | float) and not isinstance(scheme, bool) and np.isfinite(scheme) and scheme > 0
        if not (known or number or callable(scheme)):
            raise InputError(
                f"the scheme {name}: {scheme!r}",
                f"{', '.join(SCHEMES)}, critical, a function (fan_in, fan_out) -> variance, or sigma_w^2 > 0",
                "it gives every matrix its variance",
                'schemes={"a": 1.0, "b": 2.0}',
            )
    return named


def _variances(functional, scheme: Any, x, parameterization) -> dict[int, float]:
    import jax

    shapes = {i: jax.tree.leaves(functional.abstract_params)[i].shape for i in matrices(functional)}
    if scheme == "critical":
        return _critical(functional, shapes, x)
    rule: Any = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    if callable(rule):
        return {i: float(rule(*fans(shape))) for i, shape in shapes.items()}  # pyright: ignore
    return {i: float(rule) / fans(shape)[0] for i, shape in shapes.items()}


def _critical(functional, shapes: dict[int, tuple[int, ...]], x) -> dict[int, float]:
    """chi = 1 in every layer, from the input on: the factor of a layer moves its own chi and those behind it."""
    variances = {i: 1 / fans(shape)[0] for i, shape in shapes.items()}
    by_layer = {functional.leaf_names[i].rpartition("/")[0]: i for i in shapes}
    seen: set[str] = set()
    for _ in range(len(shapes)):
        layers = kernel_fn(with_variances(functional, variances), x)(x, get=("ntk", "layers")).layers
        name, chi = next((layer.name, np.mean(layer.chi)) for layer in layers if layer.name not in seen)
        seen.add(name)
        if not chi > 0:
            raise InputError(
                f"the layer {name}, at which no perturbation of the input arrives",
                "chains of layers",
                "chi = 1 cannot be reached there",
                "give its variance yourself, by a function (fan_in, fan_out) -> variance",
            )
        if name in by_layer:
            variances[by_layer[name]] /= float(chi)
    return variances
