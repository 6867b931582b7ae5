r"""Physics-informed networks at initialization: Gaussian process and tangent kernel of a residual R = D u.

D is linear, so under random weights R is a Gaussian field too, with covariance and tangent kernel
    Cov(R(x), R(x')) = D_x D_x' K(x, x'),      Theta_R(x, x') = D_x D_x' Theta(x, x').
The first needs phi with a square-integrable derivative of the operator's order m, the second one of order m + 1. Relu
has m = 1 and no more: its residual NTK is infinite at x = x' already for first-order operators, and second derivatives
of a relu network vanish almost everywhere. Derivatives are taken through the kernel's Taylor series (infinite/jets.py).

Sources: Jacot et al. 2018 (arXiv:1806.07572), Wang, Yu, Perdikaris 2022 (arXiv:2007.14527); the statistics of relu
residuals are derived in the documentation.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from initjax.applications.operators import Operator, read_operator
from initjax.errors import InputError, UnsupportedLayerError
from initjax.gaussian.closed import recognise
from initjax.gaussian.taylor import jump_order, recording
from initjax.infinite.jets import Expansion, monomials
from initjax.infinite.kernels import KernelFunction
from initjax.infinite.kernels import kernel_fn as make_kernel_fn
from initjax.trace.jaxpr import is_traced, tracing_float64


class DivergentKernelWarning(UserWarning):
    """The residual's tangent kernel is infinite at coinciding points: it grows without bound with the width."""


@dataclasses.dataclass(frozen=True)
class ResidualKernel:
    """Kernels of a residual at infinite width, made by `residual_kernel`. NumPy float64.

    Attributes
    ----------
    nngp : (n1, n2), covariance of the residuals over initializations.
    ntk : (n1, n2), tangent kernel of the residual in the parameterization of the kernel function; inf where infinite.
    leaves : leaf path -> (n1, n2), the part of every weight leaf in the standard parameterization.
    orders : orders of the operators on the first and the second argument.
    """

    nngp: np.ndarray
    ntk: np.ndarray
    leaves: dict[str, np.ndarray] = dataclasses.field(repr=False)
    orders: tuple[int, int]


def residual_kernel(kernel_fn: Any, operator: Callable, right: Callable | None = None) -> Callable:
    r"""Kernels of D u for a linear differential operator D, by D on both arguments.

    Parameters
    ----------
    kernel_fn : what `ij.kernel_fn` returns for the model u, with inputs (n, d) and one output; or a function k(x, x')
        of two points (d,) that JAX can differentiate.
    operator : `lambda u: lambda x: ...`, from a scalar function of a point (d,) to another, linear in u, built from
        `jax.grad`, `jax.hessian`, `jax.jvp`, ...; coefficients may depend on x.
    right : the operator on the second argument; None for the same. `lambda u: u` gives the covariance with u itself.

    Returns
    -------
    For the kernel of a model `residual(x1, x2=None) -> ResidualKernel`; for a function k a function
    `residual(x1, x2=None) -> (n1, n2)` array. x1: (n1, d), x2: (n2, d).

    Raises
    ------
    InputError : an operator that is not linear, not a differential operator, or of an order above 8; points that are
        not (n, d); a function k whose derivatives are not finite.
    UnsupportedLayerError : activations that are not smooth enough for the operator (relu at order 2); kernels that are
        estimates.

    Warns
    -----
    DivergentKernelWarning : the tangent kernel is infinite at some pairs, where `ntk` is inf.

    Accuracy
    --------
    Models: 1e-11 relative to the diagonal, at x = x' as well. Functions: that of their own derivatives.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from initjax.applications import pinn
    >>> transport = lambda u: lambda x: jax.grad(u)(x)[1] + 2 * jax.grad(u)(x)[0]
    >>> covariance = pinn.residual_kernel(lambda x, y: jnp.exp(-jnp.sum((x - y) ** 2) / 2), transport)
    >>> print(np.round(covariance(np.array([[0.3, 0.7]])), 4))  # (2, 1) . (2, 1)
    [[5.]]

    References
    ----------
    Raissi, Perdikaris, Karniadakis 2017 (arXiv:1701.02440), for D on both arguments of a covariance.
    """
    if isinstance(kernel_fn, KernelFunction):
        return _OfModel(kernel_fn, operator, operator if right is None else right)
    if not callable(kernel_fn):
        raise InputError(
            f"kernel_fn = {type(kernel_fn).__name__}",
            "the result of ij.kernel_fn, or a function k(x, x') of two points",
            "the operator differentiates it in both arguments",
            "give ij.kernel_fn(model, x), not its value on a batch",
        )
    return _of_function(kernel_fn, operator, operator if right is None else right)


def _points(x, name: str) -> np.ndarray:
    if is_traced(x):
        raise InputError(
            f"{name} that is traced by jit, grad or vmap",
            "concrete points",
            "Gaussian expectations are computed from their values",
            "call it outside of the transformation",
        )
    array = np.asarray(x)
    if array.dtype.kind not in "fiu" or array.ndim != 2 or not array.size or not np.isfinite(array.astype(float)).all():
        raise InputError(
            f"{name} of shape {array.shape} and dtype {array.dtype}",
            "finite real points (n, d)",
            "a differential operator acts on functions of one point (d,)",
            "stack coordinates such as (x, t) along the last axis",
        )
    return array.astype(np.float64)


def _of_function(k: Callable, left: Callable, right: Callable) -> Callable:
    def residual(x1, x2=None):
        a = _points(x1, "x1")
        b = a if x2 is None else _points(x2, "x2")
        for operator in (left, right):
            read_operator(operator, a)
        with tracing_float64(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            one = lambda x, y: left(lambda s: right(lambda t: k(s, t))(y))(x)  # noqa: E731
            out = np.asarray(jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(a, b))
        if not np.isfinite(out).all():
            i, j = np.argwhere(~np.isfinite(out))[0]
            raise InputError(
                f"k(x, x') whose derivatives are {out[i, j]} at x = {a[i]}, x' = {b[j]}",
                "a function whose derivatives of this order are finite as JAX computes them",
                "formulas with sqrt and arccos are 0/0 at x = x' when differentiated",
                "give the kernel of a model, ij.kernel_fn(model, x), whose series is exact there",
            )
        return out

    return residual


class _OfModel:
    """`residual(x1, x2=None)`; programs are recorded once for each pair of batch sizes."""

    def __init__(self, kernel: KernelFunction, left: Callable, right: Callable):
        if kernel.refusal is not None:
            raise UnsupportedLayerError(
                f"a kernel that is an estimate, because of {kernel.refusal.layer}",
                "kernels that are exact (on_unsupported='raise')",
                "derivatives of an estimate with noise are noise",
                "leave that layer out of the model of u",
                layer=kernel.refusal.layer,
            )
        self._kernel, self._operators, self._programs = kernel, (left, right), {}

    def __call__(self, x1, x2=None) -> ResidualKernel:
        found, divergent = self.parts(x1, x2)
        if divergent:
            warnings.warn(
                f"the residual's tangent kernel is infinite at {divergent} pairs of points: phi' jumps, and each width "
                "gives another, larger value there; networks with tanh, sin or gelu have a limit",
                DivergentKernelWarning,
                stacklevel=2,
            )
        return found

    def parts(self, x1, x2=None, almost_everywhere: bool = False) -> tuple[ResidualKernel, int]:
        """The kernels, and at how many pairs they diverge; without the divergent part if `almost_everywhere`."""
        a = _points(x1, "x1")
        b = a if x2 is None else _points(x2, "x2")
        left, right = (read_operator(operator, x) for operator, x in zip(self._operators, (a, b), strict=True))
        key = a.shape, b.shape
        if key not in self._programs:
            self._programs[key] = _recorded(self._kernel, a, b)
        program, met, nngp_functions, names = self._programs[key]
        orders = left.order, right.order
        smooth = _check_smoothness(nngp_functions, met, max(orders))
        expansion = Expansion(program, met, *(monomials(set(o.coefficients), a.shape[1]) for o in (left, right)))
        with tracing_float64():
            values = _combined(expansion.run(a, b), left, right)
            if not smooth and not almost_everywhere:
                other = _combined(expansion.run(a, b, singular=1.0), left, right)
                for value, moved in zip(values, other, strict=True):
                    infinite = np.abs(moved - value) > 1e-9 * (1 + np.abs(value))
                    value[infinite] = np.copysign(np.inf, (moved - value)[infinite])
        nngp, leaves = values[0], dict(zip(names, values[1:], strict=True))
        ntk = sum((self._kernel.eta[name] * leaf for name, leaf in leaves.items()), np.zeros(nngp.shape))
        return ResidualKernel(nngp, ntk, leaves, orders), int(np.isinf(ntk).sum())


def _recorded(kernel: KernelFunction, a: np.ndarray, b: np.ndarray):
    """The program of NNGP kernel and leaves, its Gaussian expectations, and those of the NNGP kernel alone."""
    names: list[str] = []

    def all_parts(x, y):
        found = kernel(x, y, get=("nngp", "leaves"))
        names[:] = list(found.leaves)
        return found.nngp, *found.leaves.values()

    with tracing_float64():
        with recording() as first:
            jax.make_jaxpr(lambda x, y: kernel(x, y, get=("nngp",)).nngp)(a, b)
        with recording() as met:
            program = jax.make_jaxpr(all_parts)(a, b)
    return program, met, first, names


def _check_smoothness(nngp_functions, met, order: int) -> bool:
    """Whether all expectations are smooth enough for finite kernels; refuses what has no residual at all."""
    for functions in nngp_functions:
        for f in functions:
            jump = jump_order(f, 3 * order)
            if jump is not None and (jump < order or order > 1):
                why = (
                    "its second derivatives vanish almost everywhere, so that the residual does not see them and "
                    "training cannot reduce it"
                    if jump < order
                    else f"its derivative of order {jump} jumps, and series of such functions are not covered beyond "
                    "first order"
                )
                raise UnsupportedLayerError(
                    f"an operator of order {order} on a network with the activation {f.name}",
                    "activations with as many continuous derivatives as the operator has, such as tanh, sin and gelu",
                    why,
                    "replace the activation, or write the equation as a system of first order",
                )
    smooth = True
    for functions in met:
        for f in functions:
            jump = jump_order(f, order)
            if jump is not None and jump < order:
                member = recognise(f)
                if member is None or member.family != "step":
                    raise UnsupportedLayerError(
                        f"the residual NTK of a network with the derivative {f.name}, which jumps",
                        "smooth activations, relu, leaky_relu and abs",
                        "the tangent kernel diverges at coinciding points, and elsewhere its series is not known here",
                        "use tanh, sin, gelu or softplus",
                    )
                smooth = False
    return smooth


def _combined(polynomials, left: Operator, right: Operator) -> list[np.ndarray]:
    """sum over alpha, beta of a_alpha(x) b_beta(x') alpha! beta! [s^alpha t^beta] K."""
    out = []
    for poly in polynomials:
        total = np.zeros((left.size, right.size))
        for (alpha, beta), value in poly.items():
            a, b = left.coefficients.get(alpha), right.coefficients.get(beta)
            if a is not None and b is not None:
                total = total + a[:, None] * b[None, :] * left.factorial(alpha) * right.factorial(beta) * value
        out.append(total)
    return out


# ------------------------------------------------------------------ statistics of the first step


@dataclasses.dataclass(frozen=True)
class InitialStatistics:
    """Second moments of a residual and its gradients over initializations, at n points. Made by `initial_statistics`.

    Attributes
    ----------
    residual : (n,), E R^2.
    gradient : leaf path -> (n,), E|dR/dleaf|^2 as automatic differentiation computes it.
    loss_gradient : leaf path -> (n,), E|dLoss/dleaf|^2 for Loss = R^2 / 2 at one point.
    width_factor : what the width contributes to `loss_gradient`: 1 + 5/n for one hidden layer of n relu units, 1 at
        infinite width.
    exact : whether everything holds at every width, not only to leading order.
    """

    residual: np.ndarray
    gradient: dict[str, np.ndarray]
    loss_gradient: dict[str, np.ndarray]
    width_factor: float
    exact: bool


def initial_statistics(
    model: Any, x: Any, operator: Callable, *, apply_kwargs: dict | None = None
) -> InitialStatistics:
    r"""How large a residual and its gradients are before the first step.

    For He-initialized relu networks on d inputs and R = a . grad u the answer does not depend on depth, widths or
    centred Gaussian biases: E R^2 = 2|a|^2/d and E|dR/dW_1|^2 = |a|^2; advection u_t + c u_x has 1 + c^2 for both.
    A later layer has fan_in (1 + c^2) / 2. The loss gradient multiplies the two, by 1 + 5/n for one hidden layer.

    Parameters
    ----------
    model : linen or nnx model (or factory, or pair) of u, with one output.
    x : points (n, d).
    operator : as in `residual_kernel`.
    apply_kwargs : further arguments of every call.

    Returns
    -------
    InitialStatistics. Relu networks: exact at every width, but for `loss_gradient` of networks with several hidden
    layers. Smooth activations: leading order in the width.

    Raises
    ------
    InputError, UnsupportedLayerError : as `residual_kernel`.

    Accuracy
    --------
    1e-11 relative.

    Examples
    --------
    >>> import jax, numpy as np
    >>> from flax import linen as nn
    >>> from initjax.applications import pinn
    >>> he = nn.initializers.he_normal()
    >>> model = nn.Sequential([nn.Dense(20, kernel_init=he), jax.nn.relu, nn.Dense(1, kernel_init=he)])
    >>> advection = lambda u: lambda x: jax.grad(u)(x)[1] + 3 * jax.grad(u)(x)[0]
    >>> found = pinn.initial_statistics(model, np.array([[0.3, 0.7]]), advection)
    >>> print(np.round(found.residual, 9), np.round(found.loss_gradient["layers_0/kernel"], 9))  # 10, 100 (1 + 5/20)
    [10.] [125.]
    """
    points = _points(x, "x")
    kernel = make_kernel_fn(model, points, apply_kwargs=apply_kwargs)
    of_model = _OfModel(kernel, operator, operator)
    rows = [of_model.parts(points[i : i + 1], almost_everywhere=True)[0] for i in range(len(points))]
    residual = np.array([row.nngp[0, 0] for row in rows])
    gradient = {name: np.array([row.leaves[name][0, 0] for row in rows]) for name in rows[0].leaves}
    met = next(iter(of_model._programs.values()))[1]
    members = [recognise(f) for functions in met for f in functions]
    homogeneous = all(m is not None and m.family in ("ramp", "step") for m in members)
    matrices = [w for w in kernel.weights if len(w.shape) == 2]
    factor = 1.0
    if homogeneous and len(matrices) == 2:
        width = min(matrices[0].shape[-1], matrices[1].shape[0]) if matrices[0].shape[-1] == matrices[1].shape[0] else 0
        ramp = next((m for m in members if m is not None and m.family == "ramp"), None)
        if width and ramp is not None:
            a, b = ramp.parameters
            factor = 1 + (6 * (a**4 + b**4) / (a * a + b * b) ** 2 - 1) / width
    loss = {name: residual * value * factor for name, value in gradient.items()}
    return InitialStatistics(residual, gradient, loss, factor, homogeneous)


# ------------------------------------------------------------------ balance of the loss terms


@dataclasses.dataclass(frozen=True)
class Balance:
    """How the terms of a physics-informed loss compete at initialization. Made by `balance`.

    Loss = 1/(2 N_r) sum R(x_r)^2 + weight / (2 N_b) sum (u(x_b) - g)^2.

    Attributes
    ----------
    weight : the weight of the boundary term that gives both terms the same mean rate of decay.
    residual_rate, boundary_rate : mean eigenvalues of the two diagonal blocks (trace over number of points), in units
        of 1 / learning rate.
    residual_condition, boundary_condition : condition numbers of the two blocks.
    condition, condition_weighted : of the joint kernel with weight 1 and with `weight`.
    max_learning_rate : largest stable learning rate with `weight`.
    kernel : (N_r + N_b, N_r + N_b), the joint tangent kernel, residual points first, without weights.
    """

    weight: float
    residual_rate: float
    boundary_rate: float
    residual_condition: float
    boundary_condition: float
    condition: float
    condition_weighted: float
    max_learning_rate: float
    kernel: np.ndarray = dataclasses.field(repr=False)


def balance(kernel_fn: KernelFunction, operator: Callable, x_residual: Any, x_boundary: Any) -> Balance:
    r"""Conditioning of the residual kernel, and the weight of the boundary term that it suggests.

    The joint tangent kernel of (R(x_r), u(x_b)) has blocks D D' Theta, D Theta and Theta. Gradient descent removes each
    block's error at a mean rate of its trace over the number of points; `weight` makes the two equal.

    Parameters
    ----------
    kernel_fn : of the model u, from `ij.kernel_fn`.
    operator : as in `residual_kernel`.
    x_residual, x_boundary : points (N_r, d) and (N_b, d).

    Returns
    -------
    Balance.

    Raises
    ------
    UnsupportedLayerError : as `residual_kernel`, and where the residual's tangent kernel is infinite (relu).

    Accuracy
    --------
    Traces 1e-11 relative; condition numbers up to 1e13.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> from initjax.applications import pinn
    >>> model = nn.Sequential([nn.Dense(64), jnp.sin, nn.Dense(1)])
    >>> x = np.linspace(-1, 1, 5)[:, None]
    >>> poisson = lambda u: lambda x: jax.hessian(u)(x)[0, 0]
    >>> found = pinn.balance(ij.kernel_fn(model, x, parameterization="ntk"), poisson, x[1:-1], x[[0, -1]])
    >>> print(f"{found.weight:.4f}")
    2.0606

    References
    ----------
    Wang, Yu, Perdikaris 2022 (arXiv:2007.14527), section 5, for weights from traces of the tangent kernel.
    """
    from initjax.spectrum import condition_number

    identity = lambda u: u  # noqa: E731
    a, b = _points(x_residual, "x_residual"), _points(x_boundary, "x_boundary")
    inner, divergent = _OfModel(kernel_fn, operator, operator).parts(a)
    if divergent:
        raise UnsupportedLayerError(
            f"a residual whose tangent kernel is infinite at {divergent} pairs of points",
            "activations whose derivative is continuous, such as tanh, sin and gelu",
            "the residual term decays at a rate that grows with the width without bound, and no weight balances it",
            "replace the activation",
        )
    across = _OfModel(kernel_fn, operator, identity).parts(a, b)[0].ntk
    edge = _OfModel(kernel_fn, identity, identity).parts(b)[0].ntk
    joint = np.block([[inner.ntk, across], [across.T, edge]])
    rates = np.trace(inner.ntk) / len(a), np.trace(edge) / len(b)
    if not rates[1] > 0:
        raise InputError(
            "boundary points at which the output does not depend on any weight",
            "points whose tangent kernel is not 0",
            "gradient descent cannot move u there, whatever the weight",
            "give the model biases, or leave the origin out",
        )
    weight = rates[0] / rates[1]
    scaled = []
    for w in (1.0, weight):
        root = np.sqrt(np.concatenate([np.full(len(a), 1 / len(a)), np.full(len(b), w / len(b))]))
        scaled.append(joint * root[:, None] * root[None, :])
    condition = lambda k: float(condition_number(k))  # noqa: E731
    top = float(np.linalg.eigvalsh(scaled[1])[-1])
    return Balance(
        float(weight), float(rates[0]), float(rates[1]), condition(inner.ntk), condition(edge), condition(scaled[0]),
        condition(scaled[1]), 2 / top, joint,
    )  # fmt: skip
