"""Kernels of networks at their real width by Monte Carlo over initializations, with standard errors.

The mean over draws of f f^T and of the tangent kernel tends to the NNGP kernel and the NTK of infinite width as 1 /
width (Huang and Yau 2019, arXiv:1909.08156; Hanin and Nica 2019, arXiv:1909.05989). Draws run side by side in one
compiled program, as many as the memory allows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical.blocks import as_bytes
from initjax.empirical.network import Network, examples
from initjax.empirical.ntk import empirical_ntk
from initjax.errors import InputError
from initjax.trace.flax import as_functional, cannot_call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelEstimate:
    """Kernels averaged over random networks. NumPy float64, (n1, n2).

    Attributes
    ----------
    nngp, nngp_error : mean of 1/k sum_o f_o(x) f_o(x') over draws (k outputs), and its standard error.
    ntk, ntk_error : mean of the tangent kernel 1/k sum_o <df_o(x), df_o(x')> over draws, and its standard error.
    draws : number of random networks.
    """

    nngp: Any
    nngp_error: Any
    ntk: Any
    ntk_error: Any
    draws: int = dataclasses.field(metadata={"static": True})

    def __repr__(self):
        shape = "x".join(map(str, np.shape(self.ntk)))
        return f"KernelEstimate({shape}, {self.draws} draws)"


def monte_carlo_kernels(
    model: Any,
    x1: Any,
    x2: Any = None,
    *,
    key: Any,
    draws: Any = 64,
    params_filter: Any = None,
    apply_kwargs: dict | None = None,
    rngs: Any = None,
    memory: Any = None,
) -> KernelEstimate:
    r"""NNGP kernel and NTK of a model at its own width, averaged over its initializations.

    Covers every model that can be differentiated, also those that `kernel_fn` refuses.

    Parameters
    ----------
    model : a linen module, an nnx factory `lambda rngs: Model(rngs=rngs)`, or a pair `(init_fn, apply_fn)`.
    x1, x2 : batches of n1 and n2 inputs; x2=None means x1.
    key : random key, typed or legacy. The same key gives the same answer.
    draws : number of random networks, at least 2.
    params_filter : which parameters count for the NTK, as in `empirical_ntk`.
    apply_kwargs, rngs : as in `kernel_fn`.
    memory : budget for the networks that run at once, in bytes or as "4GiB"; None for half of the free memory.

    Returns
    -------
    KernelEstimate with means and standard errors, each (n1, n2).

    Raises
    ------
    InputError : inputs or a model that do not fit, fewer than two draws, a finished nnx module (it has one set of
        weights, and no draws), networks whose examples influence each other, draws that overflow.

    Accuracy
    --------
    The standard errors given, relative about sqrt(2 / draws) for the NNGP kernel of one output. Against infinite width
    a bias of order depth / width remains, which more draws do not take away.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    >>> model = nn.Sequential([nn.Dense(512, kernel_init=normal), nn.relu, nn.Dense(1, kernel_init=normal)])
    >>> x = jnp.eye(3) * 3**0.5
    >>> found = ij.monte_carlo_kernels(model, x, key=jax.random.key(0), draws=100)
    >>> exact = ij.kernel_fn(model, x)(x)
    >>> bool((abs(found.ntk - exact.ntk) < 5 * found.ntk_error).all())
    True

    References
    ----------
    Lee et al. 2018 (arXiv:1711.00165) and Jacot et al. 2018 (arXiv:1806.07572) for the limits; Novak et al. 2019
    (arXiv:1810.05148), section 4, for their Monte Carlo estimates.
    """
    if isinstance(draws, bool) or not isinstance(draws, int | np.integer) or draws < 2:
        raise InputError(
            f"draws={draws!r}",
            "an integer >= 2",
            "a standard error needs a spread",
            "64 draws give the NTK of a wide network to a few percent",
        )
    draws = int(draws)
    sizes = [examples(x, name) for x, name in ((x1, "x1"), (x2, "x2")) if x is not None]
    x1, x2 = (None if x is None else jax.tree.map(jnp.asarray, x) for x in (x1, x2))
    functional = as_functional(model, x1, apply_kwargs=apply_kwargs, rngs=rngs)
    if functional.values is not None:
        raise InputError(
            f"an nnx module instance, {type(model).__name__}",
            "a factory `lambda rngs: Model(rngs=rngs)`, a linen module or a pair (init_fn, apply_fn)",
            "a finished module has one set of weights: there is nothing to average over",
            f"lambda rngs: {type(model).__name__}(..., rngs=rngs)",
        )
    apply = functional.apply
    if x2 is not None:
        try:
            jax.eval_shape(apply, functional.abstract_params, x2)
        except Exception as error:
            raise cannot_call(model, x2, dict(apply_kwargs or {}), error) from error
    network = Network(apply)
    k = network.outputs(functional.abstract_params, x1)
    ntk_fn = empirical_ntk(apply, params_filter=params_filter, memory=memory)

    def one_draw(params):
        first = apply(params, x1).reshape(-1, k)
        second = first if x2 is None else apply(params, x2).reshape(-1, k)
        nngp = jnp.matmul(first, second.T, precision="highest") / k
        return nngp, ntk_fn(params, x1, x2)

    keys = jax.random.split(key, draws)
    draw = jax.vmap(functional.init)  # not jitted: layers share a few small programs, all at once compile for seconds
    network.check_independent(jax.tree.map(lambda leaf: leaf[0], draw(keys[:1])), x1)
    leaves = jax.tree.leaves(functional.abstract_params)
    params_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    # each draw may hold the gradients of all outputs of all examples, and its kernels
    held = params_bytes * (4 + sum(sizes) * k) + 3 * 8 * sizes[0] * sizes[-1]
    budget = as_bytes(memory)
    at_once = int(min(draws, max(1, budget // held)))
    at_once = -(-draws // -(-draws // at_once))
    together = jax.jit(jax.vmap(one_draw))
    samples = []
    for start in range(0, draws, at_once):
        # the last chunk is filled up with its last network
        index = np.minimum(np.arange(start, start + at_once), draws - 1)
        parts = [np.asarray(part, np.float64)[: draws - start] for part in together(draw(keys[index]))]
        if not all(np.all(np.isfinite(part)) for part in parts):
            raise InputError(
                "random networks with outputs or gradients that are NaN or infinite",
                "networks that are finite on these inputs",
                "a mean over draws is then infinite too",
                "look for the layer where the signal overflows (ij.inspect), or use float64 parameters",
            )
        samples.append(_Moments.of(parts))
    total = samples[0]
    for other in samples[1:]:
        total = total.merged(other)
    (nngp, ntk), (nngp_error, ntk_error) = total.mean, total.standard_error()
    return KernelEstimate(nngp, nngp_error, ntk, ntk_error, draws)


@dataclasses.dataclass
class _Moments:
    """Count, means and summed squares of several arrays over draws, merged without cancellation (Chan et al. 1979)."""

    count: int
    mean: list[np.ndarray]
    squares: list[np.ndarray]

    @classmethod
    def of(cls, parts):
        means = [part.mean(0) for part in parts]
        squares = [((part - mean) ** 2).sum(0) for part, mean in zip(parts, means, strict=True)]
        return cls(len(parts[0]), means, squares)

    def merged(self, other: "_Moments") -> "_Moments":
        count = self.count + other.count
        apart = [b - a for a, b in zip(self.mean, other.mean, strict=True)]
        means = [a + gap * other.count / count for a, gap in zip(self.mean, apart, strict=True)]
        squares = [
            a + b + gap**2 * self.count * other.count / count
            for a, b, gap in zip(self.squares, other.squares, apart, strict=True)
        ]
        return _Moments(count, means, squares)

    def standard_error(self) -> list[np.ndarray]:
        return [np.sqrt(squares / (self.count - 1) / self.count) for squares in self.squares]
