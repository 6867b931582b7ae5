r"""Residual networks: how the skip connections make signals and gradients grow, and what a zero branch leaves.

    x <- x + alpha F(x), F variance preserving with weights of its own: second moments and squared gradients grow by
    1 + alpha^2 in each block, (1 + alpha^2)^L in all: 2^L for alpha = 1, at most e for alpha = L^-1/2, 1 for alpha = 0.

With alpha = 0 (zero gamma, ReZero, a zeroed last kernel) the network is its shortcuts bit for bit, and the weights of
the branches have a gradient of exactly zero in the first step: the scale in front of them alone can move. The trunk's
Jacobian is the identity only where the shortcuts are: not behind a relu after the sum, nor through projections.

The branches are found in the traced program, whatever the model looks like, and each draw of the model is run with its
branches as they are, with all of them replaced by zeros, and backwards from a random readout.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError
from initjax.trace.flax import as_functional
from initjax.trace.inline import evaluate
from initjax.trace.residual import Branch, branches
from initjax.trace.uses import Survey, survey


@dataclasses.dataclass(frozen=True)
class Block:
    """One residual sum.

    Attributes
    ----------
    branch : paths of the kernels in the branch, in order.
    end : path of the branch's last scale or kernel; empty where a nonlinearity ends it.
    alpha2 : E|branch|^2 / E|shortcut|^2, mean over draws and inputs, and its standard error.
    zero : whether the branch is exactly zero in every draw.
    shortcut : "identity" where the shortcut is the sum of the block before as it is (or the block's own input),
        "transformed" where something lies between (a relu after the sum, a norm), "projection" where it has weights.
    """

    branch: tuple[str, ...]
    end: str
    alpha2: tuple[float, float]
    zero: bool
    shortcut: str


@dataclasses.dataclass(frozen=True)
class ResidualReport:
    """Growth and step-0 gradients of a residual network at initialization; pairs are (mean, standard error).

    Attributes
    ----------
    blocks : one `Block` for each residual sum.
    growth : predicted growth of the second moment from the first shortcut to the last sum, prod(1 + alpha2): exact
        for independent branches of mean zero and identity shortcuts.
    growth_measured : the same, measured.
    gradient_growth_measured : growth of the squared gradient from the last sum back to the first shortcut.
    shortcut_only : whether the output is, bit for bit and in every draw, that of the shortcuts alone.
    identity_trunk : whether the blocks together are the identity: zero branches and identity shortcuts.
    silent : parameters whose gradient is exactly zero in every draw: they do not move in the first step.
    moving : the parameters at the ends of zero branches that do have a gradient.
    networks : number of draws.
    """

    blocks: tuple[Block, ...]
    growth: float
    growth_measured: tuple[float, float]
    gradient_growth_measured: tuple[float, float]
    shortcut_only: bool
    identity_trunk: bool
    silent: tuple[str, ...]
    moving: tuple[str, ...]
    networks: int

    def __repr__(self) -> str:
        signal, gradient = (f"{m:.4g} +- {e:.1g}" for m, e in (self.growth_measured, self.gradient_growth_measured))
        trunk = "identity trunk" if self.identity_trunk else "shortcuts only" if self.shortcut_only else "open"
        return (
            f"ResidualReport({len(self.blocks)} blocks, growth {self.growth:.4g} predicted, {signal} measured, "
            f"gradients {gradient}; {trunk}, {len(self.silent)} silent leaves)"
        )


def growth(depth, alpha=1.0) -> float:
    r"""Growth of second moments and squared gradients through L residual blocks, (1 + alpha^2)^L.

    Parameters
    ----------
    depth : number of blocks L >= 0.
    alpha : factor of the branches, finite; `depth**-0.5` keeps the growth below e.

    Returns
    -------
    Float; inf beyond 1e308.

    Raises
    ------
    InputError : values out of range.

    Accuracy
    --------
    1e-13 relative. Exact for branches that preserve the second moment and are independent of each other.

    Examples
    --------
    >>> from initjax.applications import residual
    >>> [round(residual.growth(10, alpha), 3) for alpha in (1.0, 10**-0.5, 0.0)]
    [1024.0, 2.594, 1.0]

    References
    ----------
    Yang and Schoenholz 2017 (arXiv:1712.08969); De and Smith 2020 (arXiv:2002.10444).
    """
    ok = isinstance(depth, int | np.integer) and not isinstance(depth, bool) and depth >= 0
    if not ok or not math.isfinite(alpha):
        raise InputError(
            f"depth = {depth!r}, alpha = {alpha!r}",
            "an integer >= 0 and a finite number",
            "every block multiplies second moments by 1 + alpha^2",
            "growth(10, 1.0)",
        )
    with np.errstate(over="ignore"):
        square = np.float64(alpha) ** 2
        return float(np.exp(depth * np.log1p(square)) if square < 1e-3 else (1 + square) ** int(depth))


def report(model, x, *, key, seeds=16, apply_kwargs=None, rngs=None) -> ResidualReport:
    r"""Measure the residual blocks of a model on random draws of its weights, beside (1 + alpha^2)^L.

    Parameters
    ----------
    model : linen module, nnx module, nnx factory `lambda rngs: Model(rngs=rngs)`, or pair `(init_fn, apply_fn)`.
    x : example batch, or a tuple or dict of call arguments.
    key : random key of the draws.
    seeds : number of random networks; a finished nnx module is one.
    apply_kwargs, rngs : as in `ij.kernel_fn`.

    Returns
    -------
    ResidualReport.

    Raises
    ------
    InputError : a model without residual branches, in which every sum of two paths of weights is something else.

    Accuracy
    --------
    Zero checks are exact, bit for bit. The others have standard errors over draws; `growth` leaves out correlations of
    a branch with its shortcut, which are of order 1/width for branches whose last weights have mean zero.

    Examples
    --------
    >>> import jax
    >>> from flax import linen as nn
    >>> from initjax.applications import residual
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         for _ in range(4):
    ...             h = nn.Dense(32, use_bias=False)(nn.relu(nn.LayerNorm()(x)))
    ...             x = x + h * self.param(f"gamma{_}", nn.initializers.zeros, (32,))
    ...         return nn.Dense(1)(x)
    >>> x = jax.random.normal(jax.random.key(0), (8, 32))
    >>> found = residual.report(Net(), x, key=jax.random.key(1), seeds=2)
    >>> found.identity_trunk, len(found.silent), found.moving[0]
    (True, 12, 'gamma0')

    References
    ----------
    De and Smith 2020 (arXiv:2002.10444), section 3; Goyal et al. 2017 (arXiv:1706.02677), section 5.1, zero gamma;
    Zhang, Dauphin, Ma 2019 (arXiv:1901.09321).
    """
    if isinstance(seeds, bool) or not isinstance(seeds, int | np.integer) or seeds < 1:
        raise InputError(f"seeds = {seeds!r}", "an integer >= 1", "it is the number of random networks", "seeds=16")
    functional = as_functional(model, x, apply_kwargs=apply_kwargs, rngs=rngs)
    read = survey(functional)
    found = branches(read)
    if not found:
        raise InputError(
            f"a model with the parameters {list(read.names)[:8]} and no residual branch",
            "models that add to a value something computed from it through weights",
            "growth by skip connections needs skip connections",
            "ij.inspect for other networks; loops that are not unrolled hide their sums",
        )
    data = jax.tree.leaves(jax.tree.map(jnp.asarray, x))
    run = jax.jit(lambda params, readout: _one_network(read, found, data, params, readout))
    draws = 1 if functional.values is not None else int(seeds)
    samples = []
    for one in jax.random.split(key, draws):
        init_key, readout_key = jax.random.split(one)
        params = [jnp.asarray(leaf) for leaf in jax.tree.leaves(functional.init(init_key))]
        samples.append(jax.tree.map(np.asarray, run(params, readout_key)))
    branch, skip, total, gradient, gone, same, silent = (
        np.stack([np.asarray(sample[i]) for sample in samples]) for i in range(7)
    )
    kinds = _shortcuts(read, found)
    blocks = []
    for i, one in enumerate(found):
        ratio = _ratio(branch[:, i], skip[:, i])
        names = tuple(dict.fromkeys(read.names[leaf] for leaf in one.kernels))
        end = "" if one.end is None else read.names[one.end]
        blocks.append(Block(names, end, ratio, bool(gone[:, i].all()), kinds[i]))
    quiet = np.asarray(silent.all(0)).tolist()
    ends = dict.fromkeys(leaf for one in found if one.end is not None for leaf in (one.end, *one.biases))
    zeros = [leaf for leaf in ends if any(b.zero and read.names[leaf] == b.end for b in blocks)]
    shortcut_only = bool(same.all())
    return ResidualReport(
        blocks=tuple(blocks),
        growth=float(np.prod([1 + block.alpha2[0] for block in blocks])),
        growth_measured=_ratio(total[:, -1], skip[:, 0]),
        gradient_growth_measured=_ratio(gradient[:, 0], gradient[:, -1]),
        shortcut_only=shortcut_only,
        identity_trunk=shortcut_only and all(block.zero and block.shortcut == "identity" for block in blocks),
        silent=tuple(name for name, still in zip(read.names, quiet, strict=True) if still),
        moving=tuple(read.names[leaf] for leaf in zeros if not quiet[leaf]),
        networks=draws,
    )


def _one_network(read: Survey, found: tuple[Branch, ...], data: list, params: list, key):
    """Squares of branches, shortcuts and sums, squared gradients, and what is exactly zero, in one network."""
    body = read.body
    sums = [body.equations[one.equation].outputs[0] for one in found]
    skips = [_shortcut(read, one) for one in found]
    tapped = [skips[0], *sums]

    def run(taps, params):
        def change(number, value):
            for place, tap in taps.items():
                value = value + tap if number == place else value
            return value

        env = evaluate(body, [*params, *data], change)
        return [env[n] for n in body.outputs], env

    taps = {n: jnp.zeros(body.avals[n].shape, body.avals[n].dtype) for n in tapped}
    outputs, pullback, env = jax.vjp(run, taps, params, has_aux=True)
    keys = jax.random.split(key, len(outputs))
    readout = [
        jax.random.normal(k, out.shape, out.dtype) if jnp.issubdtype(out.dtype, jnp.floating)
        else np.zeros(out.shape, jax.dtypes.float0)
        for k, out in zip(keys, outputs, strict=True)
    ]  # fmt: skip
    by_tap, by_param = pullback(readout)
    closed = {one.value for one in found}
    alone = evaluate(body, [*params, *data], lambda n, value: jnp.zeros_like(value) if n in closed else value)
    same = [jnp.all(a == alone[n]) for a, n in zip(outputs, body.outputs, strict=True)]
    square = lambda value: jnp.mean(jnp.square(value))  # noqa: E731
    return (
        jnp.stack([square(env[one.value]) for one in found]),
        jnp.stack([square(env[n]) for n in skips]),
        jnp.stack([square(env[n]) for n in sums]),
        jnp.stack([square(by_tap[n]) for n in tapped]),
        jnp.stack([jnp.all(env[one.value] == 0) for one in found]),
        jnp.all(jnp.stack(same)),
        jnp.stack([jnp.all(leaf == 0) for leaf in by_param]),
    )


def _shortcut(read: Survey, one: Branch) -> int:
    (other,) = [n for n in read.body.equations[one.equation].inputs if n != one.value]
    return other


def _shortcuts(read: Survey, found: tuple[Branch, ...]) -> list[str]:
    """What each shortcut does to the sum before it."""
    producer = {out: e for e in read.body.equations for out in e.outputs}
    with_weights = {i for use in read.uses for i in [use.equation]}
    index = {out: i for i, e in enumerate(read.body.equations) for out in e.outputs}
    kinds, before = [], None
    for one in found:
        number = _shortcut(read, one)
        weighted, changed = False, False
        while number in producer and number != before:
            equation = producer[number]
            parents = [n for n in equation.inputs if n in read.data]
            weighted |= index[number] in with_weights
            changed |= equation.name not in (
                "convert_element_type",
                "reshape",
                "copy",
                "optimization_barrier",
                "squeeze",
            )
            if before is None or len(parents) != 1:
                break
            number = parents[0]
        if before is None:  # the first block: what comes in front of it is the stem
            kinds.append("projection" if weighted and not _inside(read, one) else "identity")
        else:
            reached = number == before
            kinds.append("projection" if weighted else "identity" if reached and not changed else "transformed")
        before = read.body.equations[one.equation].outputs[0]
    return kinds


def _inside(read: Survey, one: Branch) -> bool:
    """Whether the branch is computed from the shortcut's own value."""
    producer = {out: e for e in read.body.equations for out in e.outputs}
    target, stack, seen = _shortcut(read, one), [one.value], set()
    while stack:
        number = stack.pop()
        if number == target:
            return True
        if number not in seen and number in producer:
            seen.add(number)
            stack += [n for n in producer[number].inputs if n in read.data]
    return False


def _ratio(above, below) -> tuple[float, float]:
    """Ratio of two means over draws, and its standard error by the delta method."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if not below.mean() > 0:
        return math.nan, math.nan
    value = above.mean() / below.mean()
    if len(above) < 2:
        return float(value), math.nan
    return float(value), float(np.std(above - value * below, ddof=1) / math.sqrt(len(above)) / below.mean())
