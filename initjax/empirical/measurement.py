"""What a network does at its real width: second moments, correlations and gradients of each layer, over random draws.

These are the finite-width counterparts of q, c and chi of mean-field theory (Poole et al. 2016, arXiv:1606.05340;
Schoenholz et al. 2017, arXiv:1611.01232), with the spread over draws that the theory leaves out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical import loops
from initjax.empirical.blocks import default_memory
from initjax.empirical.network import examples
from initjax.empirical.program import trace
from initjax.errors import InputError
from initjax.trace.flax import as_functional


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measurement:
    """Signals of each weight layer at initialization, mean and standard error over random networks.

    L layers in order of computation, n inputs, R random networks; h_l are the pre-activations of layer l, bias
    included. All are NumPy float64. A standard error is the standard deviation over networks / sqrt(R), and nan for
    one network.

    Attributes
    ----------
    layers : names of the layers, the paths of the modules that own their weights; `name#2` is its second use, so that
        `name`, `name#2`, ... are the turns of a loop (of more than 16 turns: 1, 2, 4, ... and the last).
    q, q_error : mean of h^2 over the units (and positions) of a layer, (L, n).
    correlation, correlation_error : h_l(x_i) . h_l(x_j) / (|h_l(x_i)| |h_l(x_j)|), (L, n, n).
    gradient, gradient_error : |v . dF(x)/dh_l|^2 / k for the k outputs F(x) and a random readout v ~ N(0, 1), (L, n).
        Its mean is the squared Jacobian norm per output: 1 in the last layer, a factor chi larger each layer further
        back, whatever the widths.
    q_samples, gradient_samples : the same for each network, (R, L, n): for ratios, logarithms, means over inputs.
    not_measured : weights (leaves with two or more axes at each turn of a loop) outside these layers: inside loops of
        unknown length and branches that depend on data, added like position codes, or unused.
    """

    q: Any
    q_error: Any
    correlation: Any
    correlation_error: Any
    gradient: Any
    gradient_error: Any
    q_samples: Any
    gradient_samples: Any
    layers: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    not_measured: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def __repr__(self):
        networks, n = self.q_samples.shape[0], self.q_samples.shape[2]
        width = max([5, *map(len, self.layers)])
        lines = [f"Measurement of {networks} networks on {n} inputs (mean over inputs, standard error over networks)"]
        lines.append(f"{'layer':{width}}  {'q':>20}  {'correlation':>11}  {'gradient':>20}")
        off = ~np.eye(n, dtype=bool)
        for i, name in enumerate(self.layers):
            c = self.correlation[i][off].mean() if n > 1 else np.nan
            q, gradient = (_over_networks(s[:, i].mean(1)) for s in (self.q_samples, self.gradient_samples))
            lines.append(f"{name:{width}}  {_pair(*q):>20}  {c:11.4f}  {_pair(*gradient):>20}")
        if self.not_measured:
            lines.append(f"not measured: {', '.join(self.not_measured)}")
        return "\n".join(lines)


def measure(
    model: Any,
    inputs: Any,
    *,
    key: Any,
    seeds: Any = 32,
    apply_kwargs: dict | None = None,
    rngs: Any = None,
    memory: Any = None,
) -> Measurement:
    r"""Second moments, correlations and gradients of every layer of randomly initialized networks.

    Draws `seeds` networks from the model's own initializers and runs each forwards on `inputs` and backwards from
    random readouts. Every product, convolution or look-up of a weight with data is a layer, found in the traced
    program: linen, nnx and plain functions alike, used as they are, also inside scans. One program is compiled, for as
    many networks at once as the memory allows.

    Parameters
    ----------
    model : a linen module, an nnx factory `lambda rngs: Model(rngs=rngs)`, or a pair `(init_fn, apply_fn)`. An nnx
        module instance has its weights already: it is measured as the one network it is.
    inputs : batch of n examples, or a tuple or dict of call arguments that are batches.
    key : random key, typed or legacy.
    seeds : number of networks R.
    apply_kwargs, rngs : as in `kernel_fn`.
    memory : budget in bytes for the networks that run at once; None for half of the free memory, at most 2 GiB.

    Returns
    -------
    Measurement, with fields of shape (L, n), (L, n, n) and (R, L, n) for L layers.

    Raises
    ------
    InputError : inputs or a model that do not fit, `seeds` below 1, a model without any layer that can be measured.

    Accuracy
    --------
    Each network in the model's own precision, rounding relative about sqrt(depth) eps (times the growth of
    perturbations in a chaotic network); the mean over networks has the standard error that is given. Squares are
    scaled before they are formed, so that gradients far below the square root of the smallest float are still
    measured.

    Examples
    --------
    He initialization keeps q under relu; the first layer sees inputs of unit second moment:

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> he = nn.initializers.he_normal()
    >>> model = nn.Sequential([nn.Dense(256, kernel_init=he), nn.relu, nn.Dense(256, kernel_init=he)])
    >>> found = ij.measure(model, jnp.ones((1, 64)), key=jax.random.key(0), seeds=16)
    >>> found.layers, found.q.shape
    (('layers_0', 'layers_2'), (2, 1))
    >>> bool((abs(found.q - 2.0) < 4 * found.q_error).all())
    True

    References
    ----------
    Poole et al. 2016 (arXiv:1606.05340), eqs. 3 and 5, for q and c; Schoenholz et al. 2017 (arXiv:1611.01232),
    section 4, for gradients.
    """
    if isinstance(seeds, bool) or not isinstance(seeds, int | np.integer) or seeds < 1:
        raise InputError(
            f"seeds={seeds!r}",
            "an integer >= 1",
            "it is the number of random networks",
            "32 give a 13 % standard deviation",
        )
    n = examples(inputs, "inputs")
    inputs = jax.tree.map(jnp.asarray, inputs)
    functional = as_functional(model, inputs, apply_kwargs=apply_kwargs, rngs=rngs)
    program = trace(functional.apply, functional.abstract_params, inputs)
    layers = [row for row in loops.rows(program) if row.place.aval.shape[:1] == (n,)]
    if not layers:
        raise InputError(
            f"a model with the parameters {list(functional.leaf_names)}, none of which meets data in a layer",
            "a model with products, convolutions or look-ups of weights, outside loops of unknown length",
            "signals are measured behind the weights, with the examples along the first axis",
            "write the loop as nn.scan, nnx.scan or a Python loop to see its layers",
        )
    if functional.values is not None:
        seeds = 1  # a finished module is one network
    samples = _sample(functional, program, layers, inputs, n, key, int(seeds), memory)
    q, gradient, correlation = (np.concatenate(part) for part in zip(*samples, strict=True))
    found = frozenset().union(*(row.layer.leaves for row in layers))
    ranks = loops.ranks(program)
    left = [name for i, name in enumerate(program.names) if i not in found and ranks[i] > 1]
    return Measurement(
        *_over_networks(q),
        *_over_networks(correlation),
        *_over_networks(gradient),
        q_samples=q,
        gradient_samples=gradient,
        layers=tuple(row.layer.name for row in layers),
        not_measured=tuple(left),
    )


def _sample(functional, program, layers, inputs, n, key, seeds, memory):
    """q, gradients and correlations, each (networks, L, ...), of one chunk of networks after another."""
    places = {row.place.path: row.place for row in layers}

    def one_network(params, readout_key):
        taps = {path: jnp.zeros((*p.turns, *p.aval.shape), p.aval.dtype) for path, p in places.items()}
        outputs, pullback, seen = jax.vjp(
            lambda taps: loops.evaluate(program, params, inputs, taps), taps, has_aux=True
        )
        readouts, k = _readouts(readout_key, outputs, n)
        (gradients,) = pullback(readouts)
        h = [_scaled(seen[row.place.path][row.index]) for row in layers]
        g = [_scaled(gradients[row.place.path][row.index]) for row in layers]
        correlations = jnp.stack([_correlation(flat) for _, flat in h])
        squares = [(size, (flat**2).mean(1)) for size, flat in h], [(size, (flat**2).sum(1) / k) for size, flat in g]
        return *(tuple(jnp.stack(part) for part in zip(*pairs, strict=True)) for pairs in squares), correlations

    params_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(functional.abstract_params))
    held = 2 * loops.held_bytes(program)  # every step's value is held for the backward pass; gradients come and go
    budget = default_memory() if memory is None else int(memory)
    at_once = int(min(seeds, max(1, budget // (2 * params_bytes + held + 8 * len(layers) * n * n))))
    at_once = -(-seeds // -(-seeds // at_once))
    keys = jax.vmap(jax.random.split)(jax.random.split(key, seeds))
    draw = jax.vmap(functional.init)  # not jitted: layers share a few small programs, all at once compile for seconds
    chunk = jax.jit(jax.vmap(one_network))
    for start in range(0, seeds, at_once):
        index = np.minimum(np.arange(start, start + at_once), seeds - 1)
        parts = jax.tree.map(lambda a: np.asarray(a, np.float64), chunk(draw(keys[index, 0]), keys[index, 1]))
        (q_size, q), (g_size, g), correlation = parts
        fresh = slice(seeds - start)  # the last chunk is filled up with its last network
        yield (q_size**2 * q)[fresh], (g_size**2 * g)[fresh], correlation[fresh]


def _readouts(key, outputs, n):
    """A normal cotangent for each floating-point output, none for others; and the number of outputs per example."""
    readouts, k = [], 0
    for output_key, out in zip(jax.random.split(key, len(outputs)), outputs, strict=True):
        if jnp.issubdtype(out.dtype, jnp.floating):
            readouts.append(jax.random.normal(output_key, out.shape, out.dtype))
            k += out.size // n
        else:
            readouts.append(np.zeros(out.shape, jax.dtypes.float0))
    return readouts, k


def _scaled(value):
    """Largest absolute entry of each example, and the entries divided by it, (n, units), so that no square
    underflows."""
    flat = value.reshape(value.shape[0], -1)
    flat = flat.astype(flat.dtype if flat.dtype == jnp.float64 else jnp.float32)
    size = jnp.abs(flat).max(1)
    return size, flat / jnp.where(size > 0, size, jnp.ones_like(size))[:, None]


def _correlation(flat):
    """Cosines between the rows; nan where a row is zero."""
    products = jnp.matmul(flat, flat.T, precision="highest")
    norms = jnp.sqrt((flat**2).sum(1))
    return products / (norms[:, None] * norms[None, :])


def _over_networks(samples):
    """Mean and standard error over the first axis."""
    networks = samples.shape[0]
    error = samples.std(0, ddof=1) / np.sqrt(networks) if networks > 1 else np.full(samples.shape[1:], np.nan)
    return samples.mean(0), error


def _pair(mean, error):
    return f"{mean:.4g} +- {error:.1g}"
