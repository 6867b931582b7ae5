"""Singular values of the Jacobian of a network as it is: end to end and block by block, without forming it.

For each random network one of the inputs is taken, and the map of that single example is differentiated: J from the
inputs, or the pre-activations of a layer, to the outputs, or those of a later layer. Its squared singular values have
the law that `jacobian_spectrum` computes in the limit. Small maps are formed and decomposed; of large ones only
products with J and J^T are taken (spectrum/bidiagonal.py), from random signs, whose mean over probes is the normalised
trace (Hutchinson 1990).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.empirical.cuts import Piece, cuts, piece_map, pieces
from initjax.empirical.jacobian_results import MeasuredJacobian, MeasuredSpectrum, Sample
from initjax.empirical.network import Network, examples
from initjax.empirical.program import Program, trace
from initjax.errors import InputError
from initjax.spectrum.bidiagonal import bidiagonalise
from initjax.trace.flax import as_functional

DENSE = 512  # smaller side up to which J is formed
_CHUNK = 64  # rows of J at a time


def measured_jacobian(
    model: Any,
    inputs: Any,
    *,
    key: Any,
    seeds: int = 8,
    start: str | None = None,
    stop: str | None = None,
    blocks: bool = True,
    method: str = "auto",
    probes: int = 4,
    steps: int = 64,
    apply_kwargs: dict | None = None,
    rngs: Any = None,
) -> MeasuredJacobian:
    r"""Squared singular values of the Jacobian of random networks, at their own widths.

    Parameters
    ----------
    model : a linen module, an nnx module, a factory `lambda rngs: Model(rngs=rngs)`, or a pair `(init_fn, apply_fn)`.
        A finished nnx module is one network; its spectra are then over inputs.
    inputs : batch of n examples, or a tuple or dict of call arguments; network r is differentiated at example r mod n.
    key : random key of the networks and of the probes.
    seeds : number of networks R.
    start, stop : names of layers (`MeasuredJacobian.blocks` lists them): the map from the pre-activations of the one
        to those of the other; None: from the inputs, to the outputs. Networks without floating inputs (tokens) start
        behind their table.
    blocks : also the map of every block: from one value through which all of the signal passes to the next.
    method : "dense" (J is formed), "golub-kahan" (products alone), or "auto": dense where the smaller side has at most
        512 entries.
    probes, steps : of Golub-Kahan, for each network: random vectors side by side, and products of each with J^T. Held
        are one network's parameters, and 8 probes steps bytes for every input and output; J never (50 layers of 4096
        units: 3.9 GB, of which 3.4 are weights; 36 s on two cores, benchmarks/spectra.py).
    apply_kwargs, rngs : as in `kernel_fn`.

    Returns
    -------
    MeasuredJacobian: `.whole` and `.blocks`, each a MeasuredSpectrum with moments, edge and their standard errors;
    `.plot(theory=...)`.

    Raises
    ------
    InputError : a model or inputs that do not fit; examples that influence each other; unknown layers or method; no
        floating value to differentiate; products that are NaN or infinite; fewer than two probes or steps.

    Accuracy
    --------
    Singular values of a formed J: eps |J| absolute, eps that of the model's precision. Golub-Kahan: moments up to
    degree 2 steps - 1 are those of the probes, whose noise is in the standard error; the edge is a lower bound, within
    `edge_residual`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> he = nn.initializers.he_normal()
    >>> model = nn.Sequential([f for _ in range(5) for f in (nn.Dense(128, kernel_init=he), nn.relu)])
    >>> x = jax.random.normal(jax.random.key(0), (4, 128))
    >>> found = ij.measured_jacobian(model, x, key=jax.random.key(1), start="layers_0", stop="layers_8")
    >>> theory = ij.jacobian_spectrum(jax.nn.relu, np.sqrt(2.0), depth=4)
    >>> bool(abs(found.whole.mean - theory.mean) < 4 * found.whole.mean_error)
    True

    References
    ----------
    Pennington, Schoenholz, Ganguli 2017 (arXiv:1711.04735), section 2; Ubaru, Chen, Saad 2017 for the quadrature.
    """
    _check_numbers(method, seeds=(seeds, 1), probes=(probes, 2), steps=(steps, 2))
    n = examples(inputs, "inputs")
    inputs = jax.tree.map(jnp.asarray, inputs)
    one = lambda i: jax.tree.map(lambda a: a[i : i + 1], inputs)  # noqa: E731
    functional = as_functional(model, one(0), apply_kwargs=apply_kwargs, rngs=rngs)
    program = trace(functional.apply, functional.abstract_params, one(0))
    chain = pieces(program)
    maps = [_Map(program, piece.name, [piece.start], [piece.stop]) for piece in chain] if blocks else []
    whole = _Map.between(program, chain, start, stop)
    wanted = {m.start for m in (whole, *maps) if m.start is not None}
    values = jax.jit(lambda params, x: _values(program, params, x, wanted))
    finished = functional.values is not None
    seeds = min(int(seeds), n) if finished else int(seeds)
    samples: list[list[Sample]] = [[] for _ in (whole, *maps)]
    for r in range(seeds):
        draw, probe = jax.random.split(jax.random.fold_in(key, r))
        params = None  # so that two networks are never held
        params = functional.init(draw)
        if r == 0:
            Network(functional.apply).check_independent(params, inputs)
        x = one(r % n)
        at = values(params, x)
        for m, into in zip((whole, *maps), samples, strict=True):
            into.append(m.sample(params, x, at, probe, method, int(probes), int(steps)))
    reports = [MeasuredSpectrum.of(m.name, tuple(s)) for m, s in zip((whole, *maps), samples, strict=True)]
    return MeasuredJacobian(reports[0], tuple(reports[1:]))


class _Map:
    """One map, from the floating inputs (`start` None) or a cut of the program, as products with its Jacobian."""

    def __init__(self, program: Program, name: str, starts: list[int], stops: list[int]):
        self.name = name
        self.start = None if set(starts) <= set(program.data) else starts[0]
        self.data = [program.data.index(n) for n in starts] if self.start is None else []
        self.n_in, self.n_out = (sum(program.avals[n].size for n in side) for side in (starts, stops))
        self.eps = float(max(jnp.finfo(program.avals[n].dtype).eps for n in (*starts, *stops)))
        run = piece_map(program, starts, stops)

        def pull(params, x, value):
            outputs, pullback = jax.vjp(lambda value: _flat(run(params, x, value)), value)
            return outputs, lambda u: _flat(pullback(u)[0])

        def backward(params, x, value, u):
            outputs, pullback = pull(params, x, value)
            return jax.vmap(pullback)(u.astype(outputs.dtype))

        def forward(params, x, value, v):
            # the transpose of the pullback: functions with a custom_vjp have no forward derivative of their own
            outputs, pullback = pull(params, x, value)
            dtype = jax.eval_shape(pullback, outputs).dtype
            return jax.vmap(lambda v: jax.linear_transpose(pullback, outputs)(v)[0])(v.astype(dtype))

        self._forward, self._backward = jax.jit(forward), jax.jit(backward)

    @classmethod
    def between(cls, program: Program, chain: list[Piece], start: str | None, stop: str | None) -> "_Map":
        ends = {piece.name: piece.stop for piece in chain}
        for name in (start, stop):
            if name is not None and name not in ends:
                raise InputError(
                    f"the layer {name!r}",
                    f"one of {', '.join(ends) or 'none: no value carries all of the signal'}",
                    "the map starts and ends at values through which all of the signal passes",
                    "leave start and stop out for the whole network, or look at .blocks",
                )
        first = None if start is None else ends[start]
        smooth = [n for n in program.data if jnp.issubdtype(program.avals[n].dtype, jnp.floating)]
        if first is None and not smooth and chain:
            first = chain[0].start
        last = None if stop is None else ends[stop]
        order = list(cuts(program))
        if first is not None and last is not None and order.index(first) >= order.index(last):
            raise InputError(
                f"start = {start!r}, stop = {stop!r}",
                "a stop behind the start",
                "the signal runs from the one to the other",
                "exchange them",
            )
        outputs = [
            n for n in program.outputs if isinstance(n, int) and jnp.issubdtype(program.avals[n].dtype, jnp.floating)
        ]
        stops = outputs if last is None else [last]
        if not stops or (first is None and not smooth):
            raise InputError(
                f"a network from {[str(program.avals[n]) for n in program.data]} to {len(stops)} floating outputs",
                "a floating input, or a value behind a table through which all of the signal passes",
                "there is nothing to differentiate with respect to",
                "differentiate a part of the network, or a function of its embeddings",
            )
        return cls(program, f"{start or 'inputs'} -> {stop or 'outputs'}", smooth if first is None else [first], stops)

    def sample(self, params, x, at, key, method, probes, steps) -> Sample:
        """Squared singular values at one example: all of them, or a quadrature of their law."""
        x, params = jax.tree.leaves(x), jax.tree.leaves(params)
        value = [x[i] for i in self.data] if self.start is None else [at[self.start]]

        def forward(v):
            return np.asarray(self._forward(params, x, value, v), np.float64)

        def backward(u):
            return np.asarray(self._backward(params, x, value, u), np.float64)

        if method == "dense" or (method == "auto" and min(self.n_out, self.n_in) <= DENSE):
            side, product = (self.n_out, backward) if self.n_out <= self.n_in else (self.n_in, forward)
            chunk = min(side, _CHUNK)
            rows = [product(np.eye(chunk, side, i)) for i in range(0, side, chunk)]
            return Sample.dense(np.concatenate(rows)[:side], self.n_out)
        seed = np.asarray(jax.random.key_data(key)).ravel()
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (probes, self.n_out))
        return Sample.quadrature(bidiagonalise(forward, backward, signs, steps, self.eps))


def _flat(leaves) -> jax.Array:
    dtype = max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.itemsize)
    return jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in leaves])


def _values(program: Program, params: Any, x: Any, wanted: set[int]) -> dict[int, Any]:
    seen = {}

    def keep(number, value):
        if number in wanted:
            seen[number] = value
        return value

    program.evaluate(params, x, keep)
    return seen


def _check_numbers(method: str, **numbers: tuple[Any, int]) -> None:
    if method not in ("auto", "dense", "golub-kahan"):
        raise InputError(
            f"method = {method!r}",
            '"auto", "dense" or "golub-kahan"',
            "it says whether J is formed",
            'leave it at "auto"',
        )
    for what, (number, least) in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
            raise InputError(
                f"{what} = {number!r}",
                f"an integer >= {least}",
                "it counts networks, random vectors, or products",
                f"leave {what} out for the default",
            )
