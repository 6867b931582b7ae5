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
from initjax.infinite.compiled import Route
from initjax.infinite.moments import Moments
from initjax.infinite.particles import PARTICLES, Particles, StandardError, standard_error
from initjax.infinite.tiles import evaluate, ratio
from initjax.trace.flax import Functional, as_functional, cannot_call, check_array, with_output
from initjax.trace.initstats import LeafStats
from initjax.trace.jaxpr import is_traced
from initjax.trace.program import Program, read_model, trace_program
from initjax.trace.walk import Walk, Walked

PARTS = ("nngp", "ntk", "leaves", "layers")


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
        NaN for weights that are used more than once or at several positions, or where examples are coupled.
    """

    name: str = dataclasses.field(metadata={"static": True})
    q: Any
    correlation: Any
    chi: Any
    gradient: Any

    def __repr__(self) -> str:
        if is_traced(self.q):
            return f"Layer({self.name!r}, traced)"
        means = ", ".join(f"{name} {np.mean(getattr(self, name)):.4g}" for name in ("q", "chi", "gradient"))
        return f"Layer({self.name!r}: {means}; means over {np.size(self.q)} inputs)"


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
    standard_error : None where every entry is exact (to rounding and the quadrature's 1e-12); for an estimate the
        `StandardError` with `nngp` and `ntk`, (n1, n2), and `leaves`, of the mean over independent networks.
    notes : where the limit of infinite width is a rough description of this network.
    particles : 0 for an exact kernel, else how many random channels stand for every layer's infinitely many.
    forced_by : the layers that are outside the exact theory; empty for an exact kernel.
    batch_rank : where statistics of the batch were taken at their expectation, layer before them -> effective rank r
        of the batch there; the relative error is of the order 1 / r. Empty otherwise.
    """

    nngp: Any
    ntk: Any
    layers: tuple[Layer, ...]
    leaves: dict[str, Any]
    standard_error: Any = None
    eta: dict[str, float] = dataclasses.field(default_factory=dict, metadata={"static": True})
    notes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    particles: int = dataclasses.field(default=0, metadata={"static": True})
    forced_by: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    batch_rank: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the entries are exact: no estimates with a standard error, no limit of a large batch."""
        return self.standard_error is None and not self.batch_rank

    def __repr__(self) -> str:
        shape = "x".join(map(str, np.shape(self.nngp)))
        how = "exact" if self.exact else "in the limit of a large batch"
        if self.standard_error is not None:
            how = f"estimated with {self.particles} particles, because of {self.forced_by[0]}"
        return f"Kernel({shape}, {len(self.layers)} layers, {len(self.leaves)} leaves, {how})"


class KernelFunction:
    """The kernel of one model: call it on one or two batches. Made by `kernel_fn`.

    Attributes
    ----------
    weights : distribution of every weight leaf, as read from its initializer.
    eta : leaf path -> weight in the NTK.
    refusal : why the kernels are estimates; None where they are exact.
    """

    def __init__(self, model, functional: Functional, weights: tuple[LeafStats, ...], eta: dict[str, float]):
        self._model, self._functional = model, functional
        self.weights, self.eta = weights, eta
        self.refusal: UnsupportedLayerError | None = None
        self._particles: Particles | None = None
        self._large_batch = False
        self._programs: dict[tuple, Program] = {}
        self._sizes: dict[tuple, dict] = {}  # bytes of one pair of examples, by what is computed
        self._routes: dict[tuple, Route] = {}

    def __repr__(self) -> str:
        how = "exact" if self.refusal is None else "large batch" if self._large_batch else "estimated"
        return f"KernelFunction({type(self._model).__name__}, {len(self.weights)} leaves, {how})"

    def estimate_by(self, particles: Particles, refusal: UnsupportedLayerError) -> None:
        """Take estimates instead of exact rules from now on, because of `refusal`."""
        self._particles, self.refusal = particles, refusal

    def average_by_batch(self, refusal: UnsupportedLayerError) -> None:
        """Take statistics of the batch at their expectation from now on, because of `refusal`."""
        self._large_batch, self.refusal = True, refusal

    def __call__(self, x1, x2=None, *, get=PARTS, memory=None, dtype=None, compiled=None) -> Kernel:
        """Kernels between two batches.

        Parameters
        ----------
        x1, x2 : batches with the structure of the example inputs, sizes n1 and n2; x2 None means x1, at half the cost.
        get : which of "nngp", "ntk", "leaves", "layers" to compute; what is left out is None or empty.
        memory : budget for results and work, in bytes or as "2GiB"; None: half of what is free.
        dtype : of the matrices in the result, float64 or float32; the work is done in float64.
        compiled : whether tiles of the kernel are compiled: True, at once (seconds, and then several times faster);
            False, not at all; None, when the work of the calls so far outweighs it. Models that draw random numbers,
            take integers, let examples meet, or whose activations have neither closed form nor a short series (kinks)
            run step by step in any case.

        Returns
        -------
        Kernel of shape (n1, n2), NumPy float64 unless `dtype` says otherwise; for traced inputs in their dtype.

        Raises
        ------
        InputError : inputs the model cannot be called on, complex, NaN or infinite; an unknown part; a budget that does
            not hold the results and one pair of examples; traced inputs where statistics of the batch are averaged.
        """
        same = x2 is None
        batches = (x1,) if same else (x1, x2)
        for batch, name in zip(batches, ("x1", "x2"), strict=False):
            for leaf in jax.tree.leaves(batch):
                check_array(leaf, name)
        kind = (_parts(get), *(tuple(np.shape(leaf)[1:] for leaf in jax.tree.leaves(batch)) for batch in batches))
        if self._particles is not None:
            return self._estimated(batches, kind[0], _dtype(dtype))
        if self._large_batch and is_traced(*batches):
            raise InputError(
                "inputs that are traced by jax.jit, grad or vmap, for a model with statistics of a large batch",
                "concrete arrays",
                "whether the batch is large is told by its effective rank, which has to be known",
                "call the kernel function outside of jax.jit",
            )
        if not is_traced(*batches):
            return self._concrete(batches, kind, memory, _dtype(dtype), compiled)
        dtype = jnp.result_type(*[leaf for leaf in jax.tree.leaves(batches) if is_traced(leaf)])
        with jax.numpy_dtype_promotion("standard"):  # tracers meet NumPy float64 constants
            walks = [self.walk(batch) for batch in batches]
            kernel = self._compute(walks[0], None if same else walks[1], kind, memory, np.float64, True)
            return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), kernel)

    def walk(self, x, mean=None, judges: bool = True) -> Walked:
        """The model's values on a batch, before any moment is computed; raises UnsupportedLayerError.

        mean : expectation of a body, where the program depends on it (norms). judges : whether statistics over a batch
            of low effective rank are refused.
        """
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
        moments = Moments(self.weights)
        spread = moments.spread if self._large_batch else None
        return Walk(self._programs[key], mean or moments.expectation, spread, judges).run(leaves)

    def _estimated(self, batches: tuple, get: tuple[str, ...], dtype) -> Kernel:
        assert self._particles is not None and self.refusal is not None
        found = self._particles(*batches)
        zero = np.zeros(found.nngp.shape)
        leaves = {s.name: found.leaves.get(s.name, zero) for s in self.weights}
        ntk = sum((self.eta[name] * leaf for name, leaf in leaves.items()), zero)
        tell = lambda value: value if is_traced(value) else value.astype(dtype)  # noqa: E731
        mean, error = lambda samples: tell(samples.mean(0)), lambda samples: tell(standard_error(samples))
        layers, previous = [], 1.0
        for name, of in found.layers.items() if "layers" in get else ():
            chi, previous = ratio(of["slope"], previous), of["slope"]
            layers.append(Layer(name, of["q"], of["correlation"], chi, of["gradient"]))
        shown = leaves if "leaves" in get else {}
        kernels = {"nngp": found.nngp, "ntk": ntk}
        means = {part: mean(value) if part in get else None for part, value in kernels.items()}
        errors = {part: error(value) if part in get else None for part, value in kernels.items()}
        why = f"{self.refusal.given}: {self.refusal.why}"
        bias = f"estimated: hidden layers of {found.width} channels leave a bias of order 1/{found.width}"
        return Kernel(
            nngp=means["nngp"],
            ntk=means["ntk"],
            layers=tuple(layers),
            leaves={name: mean(leaf) for name, leaf in shown.items()},
            standard_error=StandardError(**errors, leaves={name: error(leaf) for name, leaf in shown.items()}),
            eta=self.eta,
            notes=(why, bias, *(s.note for s in self.weights if s.note), *found.notes),
            particles=found.networks * found.width,
            forced_by=(self.refusal.layer,),
        )

    def _concrete(self, batches: tuple, kind, memory, dtype, compiled) -> Kernel:
        leaves = [[np.asarray(leaf) for leaf in jax.tree.leaves(batch)] for batch in batches]
        route = self._route(batches, leaves, kind[0]) if compiled is not False and not self._large_batch else None
        if route is not None:
            found = route.ready(leaves[0], leaves[1] if len(leaves) > 1 else None, memory, dtype)
            if found is not None:
                return self._told(found, route.notes)
        walks = [self.walk(batch) for batch in batches]
        notes = walks[0].notes
        by_tiles = route and (lambda parts: route.first(parts, leaves, notes, memory, compiled is True))
        return self._compute(walks[0], walks[1] if len(walks) > 1 else None, kind, memory, dtype, False, by_tiles)

    def _route(self, batches: tuple, leaves: list, get: tuple[str, ...]) -> Route | None:
        """What is known of calls of this kind; None where the two batches differ in kind."""
        tree = jax.tree.structure(batches[0])
        shapes = {(jax.tree.structure(b), *(x.shape[1:] for x in s)) for b, s in zip(batches, leaves, strict=True)}
        if len(shapes) > 1:
            return None

        def function(*sides):
            walks = [self.walk(jax.tree.unflatten(tree, side)) for side in sides]
            second = walks[1] if len(walks) > 1 else None
            return evaluate(walks[0], second, self.weights, self.eta, get, None, np.float64, True, {})

        return self._routes.setdefault((get, *shapes), Route(function, leaves[0]))

    def _compute(self, first: Walked, second: Walked | None, kind, memory, dtype, traced, by_tiles=None) -> Kernel:
        sizes = self._sizes.setdefault(kind, {})
        found = evaluate(first, second, self.weights, self.eta, kind[0], memory, dtype, traced, sizes, by_tiles)
        ranks = dict(first.ranks)
        for name, rank in (second.ranks if second is not None else {}).items():
            ranks[name] = min(rank, ranks[name])
        return self._told(found, first.notes, ranks)

    def _told(self, found: dict[str, Any], walked: list[str], ranks: dict[str, float] | None = None) -> Kernel:
        ranks = ranks or {}
        notes = tuple(s.note for s in self.weights if s.note) + tuple(walked)
        notes += tuple(
            f"{name}: the mean square deviation over the batch is taken at its expectation; the effective rank of the "
            f"batch is {rank:.3g} there, which leaves a relative error of the order of {1 / rank:.1g}"
            for name, rank in ranks.items()
        )
        layers, previous = [], 1.0
        for name, of in found.get("layers", {}).items():
            missing = np.full(np.shape(of["q"]), np.nan)
            chi = missing if of["slope"] is None else ratio(of["slope"], previous)
            previous = previous if of["slope"] is None else of["slope"]
            gradient = missing if of["gradient"] is None else of["gradient"]
            layers.append(Layer(name, of["q"], of["correlation"], chi, gradient))
        leaves = found.get("leaves", {})
        return Kernel(
            nngp=found.get("nngp"),
            ntk=found.get("ntk"),
            layers=tuple(layers),
            leaves=leaves,
            eta=self.eta,
            notes=notes,
            batch_rank=ranks,
        )


def kernel_fn(
    model,
    inputs,
    *,
    parameterization="standard",
    apply_kwargs=None,
    rngs=None,
    on_unsupported="raise",
    key=None,
    particles=PARTICLES,
    output=None,
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
    on_unsupported : "raise": refuse what is not exact. "monte_carlo": estimate it, with a standard error for every
        entry (softmax attention, max-pooling, LSTM and GRU, activations after a residual sum, ...). Exact models stay
        exact; what has no limit of infinite width (W with W^T, token mixing, fixed matrices on channels) is refused.
        "large_batch": BatchNorm in training mode with the variance over the batch at its expectation, the limit in
        which the effective rank of the batch is large (`Kernel.batch_rank`); low rank and all else are refused.
    key : random key of the estimate; None for the same one in every call.
    particles : random channels that stand for every layer's infinitely many; the standard error falls as the root.
    output : of a model with several outputs the one that is meant, by its path (`"policy"`, `"heads/value"`, `0`), or a
        function of all of them.

    Returns
    -------
    KernelFunction, to be called as `kernel(x1, x2=None) -> Kernel`.

    Raises
    ------
    UnsupportedLayerError : a layer outside the exact theory, named with primitive, reason and remedy; decided here,
        over the whole program, before anything is computed.
    InputError : no model, inputs that do not fit, unknown parameterization, a pattern that finds no leaf, an output
        that is not there.

    Accuracy
    --------
    float64, concrete inputs: 1e-12 relative. Traced float32 inputs: about 1e-6. Estimates: `Kernel.standard_error`,
    from at least 16 independent networks, beside a bias of the order of 1 over their width (told in `Kernel.notes`).

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
    if on_unsupported not in ("raise", "monte_carlo", "large_batch"):
        raise InputError(
            f"on_unsupported = {on_unsupported!r}",
            '"raise", "monte_carlo" or "large_batch"',
            "it says what to do where the exact theory ends",
            'leave it at "raise"',
        )
    functional = as_functional(model, inputs, apply_kwargs=apply_kwargs, rngs=rngs)
    functional = functional if output is None else with_output(functional, output)
    weights = read_model(functional)
    kernel = KernelFunction(model, functional, weights, _eta(parameterization, weights))
    example = jax.tree.map(_zeros_if_abstract, inputs)
    estimator = Particles(functional, weights, jax.random.key(0) if key is None else key, _count(particles))
    try:
        walked = kernel.walk(example)
    except UnsupportedLayerError as error:
        if on_unsupported == "raise":
            raise _with_remedy(error, estimator, example) from error.__cause__
        if on_unsupported == "large_batch":
            kernel.average_by_batch(error)
            concrete = all(a is b for a, b in zip(jax.tree.leaves(example), jax.tree.leaves(inputs), strict=True))
            _check_output(kernel.walk(example, judges=concrete).output.shape)
            return kernel
        estimator.check(example)
        kernel.estimate_by(estimator, error)
        _check_output(functional.abstract_output.shape)
        return kernel
    _check_output(walked.output.shape)
    return kernel


def _parts(get) -> tuple[str, ...]:
    chosen = (get,) if isinstance(get, str) else tuple(get)
    if not chosen or any(part not in PARTS for part in chosen):
        raise InputError(
            f"get = {get!r}",
            f"some of {', '.join(PARTS)}",
            "these are the parts of a Kernel",
            'leave it out for all of them, or use ("nngp", "ntk") where only these matter',
        )
    return chosen


def _dtype(dtype) -> np.dtype:
    try:
        chosen = np.dtype(np.float64 if dtype is None else dtype)
    except TypeError:
        chosen = np.dtype(bool)
    if chosen not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise InputError(
            f"dtype = {dtype!r}",
            "float64 or float32",
            "kernels are computed in float64 and kept in one of these",
            "leave it out for float64",
        )
    return chosen


def _zeros_if_abstract(leaf):
    abstract = isinstance(leaf, jax.ShapeDtypeStruct) or is_traced(leaf)
    return np.zeros(leaf.shape, leaf.dtype) if abstract else leaf


def _with_remedy(error: UnsupportedLayerError, estimator: Particles, example) -> UnsupportedLayerError:
    """The refusal of the exact rules, with an estimate as its remedy where there is one, or why there is none."""
    try:
        estimator.check(example)
    except UnsupportedLayerError as none:
        same = (none.layer, none.primitive) == (error.layer, error.primitive)
        why = error.why if same else f"{error.why}; no estimate either, `{none.primitive}` in {none.layer}: {none.why}"
        return UnsupportedLayerError(error.given, error.accepted, why, error.remedy, error.layer, error.primitive)
    remedy = f'estimate it with on_unsupported="monte_carlo" (values with a standard error); or {error.remedy}'
    return UnsupportedLayerError(error.given, error.accepted, error.why, remedy, error.layer, error.primitive)


def _count(particles) -> int:
    if isinstance(particles, bool) or not isinstance(particles, int | np.integer) or particles < 1:
        raise InputError(
            f"particles = {particles!r}",
            "an integer >= 1",
            "it is the number of random channels",
            f"{PARTICLES} is usual",
        )
    return int(particles)


def _check_output(shape: tuple[int, ...]) -> None:
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


__all__ = ["Kernel", "KernelFunction", "Layer", "kernel_fn"]
