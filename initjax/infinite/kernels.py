r"""`kernel_fn`: NNGP kernel, NTK and per-layer theory of a Flax model at infinite width.

The NTK is reported for every weight leaf. Flax networks are in the standard parameterization, where the kernel of
gradient descent is sum_leaf Theta_leaf; other parameterizations weight the leaves, sum_leaf eta_leaf Theta_leaf.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError, UnsupportedLayerError
from initjax.infinite.moments import Moments
from initjax.trace.domain import Base, Tangent
from initjax.trace.flax import Functional, as_functional, cannot_call, check_array
from initjax.trace.graph import reachable
from initjax.trace.initstats import LeafStats
from initjax.trace.jaxpr import is_traced
from initjax.trace.maps import xp_of
from initjax.trace.program import Program, read_model, trace_program
from initjax.trace.walk import INPUTS, Walk, Walked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """Theory of one layer: the output of a module that owns weights, before any activation.

    Attributes
    ----------
    name : path of the module.
    q : (n1,), second moment of one unit, mean over positions.
    correlation : (n1, n2), second moment between examples over the root of their q's.
    chi : (n1,), factor by which a small perturbation's square grows from the layer before (in program order; for the
        first layer, from the input) to this one: sigma_w^2 E[phi'^2] in a plain network. Above 1 signals and gradients
        explode, below 1 they vanish. NaN where no perturbation of the input arrives.
    gradient : (n1,), E|dy/du|^2, squared norm of the gradient of one output unit with respect to this layer's units;
        NaN for weights that are used more than once or at several positions.
    """

    name: str = dataclasses.field(metadata={"static": True})
    q: Any
    correlation: Any
    chi: Any
    gradient: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """Kernels of a network at infinite width, per output unit (mean over output positions, if there are several).

    Attributes
    ----------
    nngp : (n1, n2), covariance of the outputs at initialization, E[y(x1) y(x2)].
    ntk : (n1, n2), sum over leaves of eta * leaves.
    layers : one `Layer` for each module that owns weights, in program order.
    leaves : leaf path -> (n1, n2), the part of every weight leaf in the standard parameterization, E<dy/dw, dy'/dw>.
    eta : leaf path -> its weight in `ntk`.
    standard_error : None: every entry is exact (to rounding and the quadrature's 1e-12).
    notes : where the limit of infinite width is a rough description of this network.
    """

    nngp: Any
    ntk: Any
    layers: tuple[Layer, ...]
    leaves: dict[str, Any]
    standard_error: Any = None
    eta: dict[str, float] = dataclasses.field(default_factory=dict, metadata={"static": True})
    notes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def __repr__(self) -> str:
        shape = "x".join(map(str, np.shape(self.nngp)))
        return f"Kernel({shape}, {len(self.layers)} layers, {len(self.leaves)} leaves, exact)"


class KernelFunction:
    """The kernel of one model: call it on one or two batches. Made by `kernel_fn`.

    Attributes
    ----------
    weights : distribution of every weight leaf, as read from its initializer.
    eta : leaf path -> weight in the NTK.
    """

    def __init__(self, model, functional: Functional, weights: tuple[LeafStats, ...], eta: dict[str, float]):
        self._model, self._functional = model, functional
        self.weights, self.eta = weights, eta
        self._programs: dict[tuple, Program] = {}

    def __repr__(self) -> str:
        return f"KernelFunction({type(self._model).__name__}, {len(self.weights)} leaves)"

    def __call__(self, x1, x2=None) -> Kernel:
        """Kernels between two batches.

        Parameters
        ----------
        x1, x2 : batches with the structure of the example inputs, sizes n1 and n2; x2 None means x1.

        Returns
        -------
        Kernel of shape (n1, n2), NumPy float64; for traced inputs in their dtype.

        Raises
        ------
        InputError : inputs the model cannot be called on, complex, NaN or infinite.
        """
        same = x2 is None
        batches = (x1,) if same else (x1, x2)
        for batch, name in zip(batches, ("x1", "x2"), strict=False):
            for leaf in jax.tree.leaves(batch):
                check_array(leaf, name)
        if not is_traced(*batches):
            return self._compute(*[self.walk(batch) for batch in batches])
        dtype = jnp.result_type(*[leaf for leaf in jax.tree.leaves(batches) if is_traced(leaf)])
        with jax.numpy_dtype_promotion("standard"):  # tracers meet NumPy float64 constants
            kernel = self._compute(*[self.walk(batch) for batch in batches])
            return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), kernel)

    def walk(self, x) -> Walked:
        """The model's values on a batch, before any moment is computed; raises UnsupportedLayerError."""
        leaves = jax.tree.leaves(x)
        leaves = [leaf if is_traced(leaf) else np.asarray(leaf) for leaf in leaves]
        tree = jax.tree.structure(x)
        key = (tree, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))
        if key not in self._programs:
            shapes = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves])
            try:
                self._programs[key] = trace_program(self._functional, self.weights, shapes)
            except InputError:
                raise
            except Exception:
                try:
                    jax.eval_shape(self._functional.apply, self._functional.abstract_params, shapes)
                except Exception as error:  # the model itself cannot be called on these inputs
                    raise cannot_call(self._model, x, {}, error) from error
                raise
        return Walk(self._programs[key], Moments(self.weights, True).expectation).run(leaves)

    def _compute(self, first: Walked, second: Walked | None = None) -> Kernel:
        same = second is None
        second = first if second is None else second
        moments = Moments(self.weights, same)
        sides = [[w.output.body, *w.layers.values(), *_tangents(w)] for w in (first, second)]
        moments.run(*sides)
        nngp = _per_example(moments.pair(first.output.body, second.output.body), first, second)
        leaves, on_diagonal = {}, {}
        if first.tangent is not None and second.tangent is not None:
            leaves = moments.tangents(first.tangent.body, second.tangent.body)
            on_diagonal = moments.tangents(first.tangent.body, first.tangent.body, "diagonal")
        zero = np.zeros(np.shape(nngp))
        leaves = {
            s.name: _per_example(leaves[s.name], first, second) if s.name in leaves else zero for s in self.weights
        }
        ntk = sum((leaf if self.eta[name] == 1.0 else self.eta[name] * leaf for name, leaf in leaves.items()), zero)
        layers = _layers(moments, first, second, on_diagonal)
        notes = tuple(s.note for s in self.weights if s.note) + tuple(first.notes)
        return Kernel(nngp, ntk, layers, leaves, None, self.eta, notes)


def kernel_fn(
    model, inputs, *, parameterization="standard", apply_kwargs=None, rngs=None, on_unsupported="raise"
) -> KernelFunction:
    r"""Infinite-width NNGP kernel and NTK of a model, read from the module as written.

    The model is traced to its program; every weight leaf enters with the variance its own initializer gives it. As all
    hidden widths grow, the output is a Gaussian process with covariance

        K(x, x') = E[y(x) y(x')],      Theta(x, x') = sum_leaf eta_leaf E<dy(x)/dw_leaf, dy(x')/dw_leaf>.

    Forward derivatives alone are used (no gradient-independence assumption), so weight sharing is exact.

    Parameters
    ----------
    model : linen module, nnx module, nnx factory `lambda rngs: Model(rngs=rngs)`, or pair `(init_fn, apply_fn)`.
    inputs : example batch (n, ...), or a tuple or dict of call arguments; fixes shapes, not values.
    parameterization : "standard": eta = 1, the kernel of plain gradient descent on this Flax model at its own widths,
        to leading order. "ntk": eta = Var(leaf) for random leaves and 1 for constant ones, the kernel of the
        NTK-parameterized twin, free of widths. A dict {regular expression: eta}: learning-rate weights of the leaves
        whose path it finds (muP, frozen layers); 1 for the others.
    apply_kwargs : further keyword arguments of every call, such as `train=False`.
    rngs : further random streams by name, fixed for every call.
    on_unsupported : "raise": refuse what is not exact. "monte_carlo" is accepted for models that are exact.

    Returns
    -------
    KernelFunction, to be called as `kernel(x1, x2=None) -> Kernel`.

    Raises
    ------
    UnsupportedLayerError : a layer outside the exact theory, named with primitive, reason and remedy; decided here,
        over the whole program, before anything is computed.
    InputError : no model, inputs that do not fit, unknown parameterization, a pattern that finds no leaf.

    Accuracy
    --------
    float64, concrete inputs: 1e-12 relative. Traced float32 inputs: about 1e-6.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> model = nn.Sequential([nn.Dense(512, kernel_init=jax.nn.initializers.he_normal()), jax.nn.relu, nn.Dense(1)])
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> kernel = ij.kernel_fn(model, x, parameterization="ntk")(x)
    >>> print(np.round(kernel.nngp, 6))  # 1/2 and 1 / (2 pi): Var W x = 1, K = E[relu relu]
    [[0.5      0.159155]
     [0.159155 0.5     ]]

    References
    ----------
    Lee et al. 2018 (arXiv:1711.00165), Jacot et al. 2018 (arXiv:1806.07572), Yang 2019 (arXiv:1910.12478) and 2020
    (arXiv:2006.14548): Gaussian process, NTK, and the programs for which both hold.
    """
    if on_unsupported not in ("raise", "monte_carlo"):
        raise InputError(
            f"on_unsupported = {on_unsupported!r}",
            '"raise" or "monte_carlo"',
            "it says what to do where the exact theory ends",
            'leave it at "raise"',
        )
    functional = as_functional(model, inputs, apply_kwargs=apply_kwargs, rngs=rngs)
    weights = read_model(functional)
    kernel = KernelFunction(model, functional, weights, _eta(parameterization, weights))
    example = jax.tree.map(_zeros_if_abstract, inputs)
    try:
        walked = kernel.walk(example)
    except UnsupportedLayerError as error:
        if on_unsupported == "raise":
            raise
        raise UnsupportedLayerError(
            f"{error.given}, with on_unsupported = 'monte_carlo'",
            error.accepted,
            f"{error.why}; Monte Carlo for such layers is not part of this version",
            error.remedy,
            error.layer,
            error.primitive,
        ) from error
    _check_output(walked)
    return kernel


def _zeros_if_abstract(leaf):
    abstract = isinstance(leaf, jax.ShapeDtypeStruct) or is_traced(leaf)
    return np.zeros(leaf.shape, leaf.dtype) if abstract else leaf


def _check_output(walked: Walked) -> None:
    shape = walked.output.shape
    if not shape:
        raise InputError(
            "a model whose output is one number for the whole batch",
            "an output with the examples along its first axis",
            "a kernel has one entry for each pair of examples",
            "return the outputs of the examples instead of a loss",
        )


def _eta(parameterization, weights: tuple[LeafStats, ...]) -> dict[str, float]:
    names = [s.name for s in weights]
    if isinstance(parameterization, str) and parameterization == "standard":
        return dict.fromkeys(names, 1.0)
    if isinstance(parameterization, str) and parameterization == "ntk":
        return {s.name: s.variance if s.kind != "constant" else 1.0 for s in weights}
    if not isinstance(parameterization, dict):
        raise InputError(
            f"parameterization = {parameterization!r}",
            '"standard", "ntk", or a dict {regular expression: eta}',
            "it sets the weight eta of every leaf in the NTK",
            'use "standard" for the gradient kernel of the Flax model as it is',
        )
    eta = dict.fromkeys(names, 1.0)
    for pattern, value in parameterization.items():
        try:
            value = float(value)
            found = [name for name in names if re.search(pattern, name)]
        except (TypeError, ValueError, re.error) as error:
            value, found = math.nan, [str(error)]
        if not math.isfinite(value) or value < 0:
            raise InputError(
                f"parameterization[{pattern!r}] = {parameterization[pattern]!r}",
                "a regular expression and a finite number >= 0",
                "eta is a learning rate relative to the other leaves",
                "use 0.0 to freeze a leaf",
            )
        if not found:
            raise InputError(
                f"the pattern {pattern!r} in parameterization, which finds no leaf",
                f"patterns found in one of {', '.join(names)}",
                "a pattern that finds nothing is most likely misspelt",
                "print the paths with initjax.trace.flax.leaf_names(params)",
            )
        eta.update(dict.fromkeys(found, value))
    return eta


# ------------------------------------------------------------------ from moments to results


def _tangents(walked: Walked) -> list[Tangent]:
    extra = [walked.tangent.body] if walked.tangent is not None else []
    return [*walked.tangents.values(), *(t for t in extra if isinstance(t, Tangent))]


def _per_example(value, first: Walked, second: Walked):
    """(n1, n2) from a moment over all positions: the mean over equal output positions."""
    n1, n2 = first.output.shape[0], second.output.shape[0]
    if value is None:
        return np.zeros((n1, n2))
    return _mean_over_positions(value, n1, n2)


def _mean_over_positions(value, n1: int, n2: int):
    count = math.isqrt(math.prod(np.shape(value)) // (n1 * n2))
    if count == 1:
        return value.reshape(n1, n2)
    return xp_of(value).einsum("apbp->ab", value.reshape(n1, count, n2, count)) / count


def _layers(moments: Moments, first: Walked, second: Walked, on_diagonal) -> tuple[Layer, ...]:
    n1, n2 = first.output.shape[0], second.output.shape[0]
    kernels = _single_uses(moments, first)
    layers, previous = [], 1.0
    for name, u in first.layers.items():
        v = second.layers[name]
        q1, q2 = (_by_example(moments.diagonal(s, s), n) for s, n in ((u, n1), (v, n2)))
        correlation = _correlation(moments.pair(u, v), q1, q2, moments.same)
        slope = None
        if name in first.tangents:
            slope = moments.tangents(first.tangents[name], first.tangents[name], "diagonal").get(INPUTS)
        if slope is None:
            chi = np.full(n1, np.nan)
        else:
            slope = _by_example(slope, n1)
            chi, previous = _ratio(slope, previous), slope
        gradient = np.full(n1, np.nan)
        if name in kernels:
            leaf, norm = kernels[name]
            if leaf in on_diagonal:
                gradient = _ratio(_by_example(on_diagonal[leaf], n1), norm.reshape(n1))
        layers.append(Layer(name, q1, correlation, chi, gradient))
    return tuple(layers)


def _single_uses(moments: Moments, walked: Walked) -> dict[str, tuple[str, Any]]:
    """Layer -> (its weight, E|h|^2) for weights used once, at one position an example."""
    if walked.tangent is None:
        return {}
    n = walked.output.shape[0]
    found: dict[str, list] = {}
    for atom in reachable([walked.tangent.body]):
        if isinstance(atom, Base) and atom.tangent and atom.view.tangent and atom.kind == "dot":
            leaf = moments.leaves[atom.view.leaf].name
            norm = moments.dot_atoms(atom, atom, "diagonal").get(leaf)
            if norm is not None:
                found.setdefault(atom.layer, []).append((leaf, norm))
    return {layer: uses[0] for layer, uses in found.items() if len(uses) == 1 and uses[0][1].size == n}


def _by_example(value, n: int):
    if value is None:
        return np.zeros(n)
    return value.reshape(n, -1).mean(axis=1)


def _correlation(cov, q1, q2, same: bool):
    n1, n2 = q1.shape[0], q2.shape[0]
    cov = np.zeros((n1, n2)) if cov is None else _mean_over_positions(cov, n1, n2)
    xp = xp_of(cov, q1, q2)
    norm = xp.sqrt(q1)[:, None] * xp.sqrt(q2)[None, :]
    value = _ratio(cov, norm)
    if same:
        value = xp.where(np.eye(n1, dtype=bool) & (norm > 0), 1.0, value)
    return value


def _ratio(above, below):
    """above / below, NaN where below is zero."""
    xp = xp_of(above, below)
    positive = xp.asarray(below) > 0
    return xp.where(positive, above / xp.where(positive, below, 1.0), xp.nan)


__all__ = ["Kernel", "KernelFunction", "Layer", "kernel_fn"]
