"""An activation is any elementwise JAX callable, together with the places where it is not smooth.

`Activation` checks the callable once, evaluates it and its derivative in float64, and knows
  * its kinks and jumps, found by tracing (`kinks.py`) or declared;
  * `breaks(u_max)`: a partition of [-u_max, u_max] on every cell of which the function is a polynomial of low
    degree to 13 digits, found by bisection. Gauss-Legendre on these cells, cut further by the Gaussian's own scale,
    is accurate for every q: saturation, kinks and oscillation are all just cells.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError, NotElementwiseError, QuadratureError, TracedParameterError
from initjax.gaussian.kinks import find_kinks
from initjax.gaussian.nodes import ORDER, legendre, legendre_transform
from initjax.trace.jaxpr import float64, is_traced

_SIZES = (256, 4096, 65536, 524288)  # batch sizes that are compiled; everything is padded to one of them
_MAX_CELLS = 20_000  # cells of one activation; reached only by fast oscillation at large q
_NAN_FREE = 30.0  # an activation must be finite at least on [-30, 30]


class Activation:
    """An elementwise activation `fn`, with its kinks declared or found by tracing.

    Parameters
    ----------
    fn : elementwise JAX callable, real to real: shape (...) -> (...), same dtype.
    kinks : points where fn or its derivative jumps. None (default): found by tracing `fn` for comparisons
        (max, min, abs, sign, select, clamp), then by bisection. Declared kinks are added to the ones found.

    Raises
    ------
    NotElementwiseError : fn changes the shape or dtype, mixes entries, is complex, or cannot be traced.
    InputError : fn is not callable, is NaN or infinite near 0, or a kink is not a finite number.

    Notes
    -----
    Like `jax.jit`, an Activation evaluates a Python function once: if it reads global state, later changes
    of that state are not seen.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from initjax import Activation
    >>> Activation(lambda x: jnp.clip(x, -1, 1)).kinks
    (-1.0, 1.0)
    """

    def __init__(self, fn: Any, kinks: tuple[float, ...] | None = None):
        if isinstance(fn, Activation):
            fn, kinks = fn.fn, tuple(fn._declared) + tuple(kinks or ())
        if not callable(fn):
            raise InputError(
                f"phi = {fn!r} is not callable.",
                "an elementwise JAX function such as jnp.tanh, jax.nn.gelu or lambda x: x * jnp.sin(x).",
                "its Gaussian expectations are computed by evaluating it.",
                "pass the function itself, not its name or its value.",
            )
        declared = tuple(float(k) for k in (kinks or ()))
        if not all(np.isfinite(declared)):
            raise InputError(
                f"kinks = {kinks!r}.",
                "finite real numbers.",
                "a kink is a point of the real line at which the quadrature is split.",
                "declare only finite kinks, or leave kinks=None to have them found.",
            )
        self.fn: Any = fn
        self._declared = declared
        self.name = getattr(fn, "__name__", None) or type(fn).__name__
        _check_elementwise(fn, self.name)
        self._value = jax.jit(fn)
        self._both = jax.jit(lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),)))
        self._cells: dict[int, np.ndarray] = {}  # octave -> inner edges, filled on demand
        self._amplitude = np.zeros(2)
        self._check_finite()

    def __call__(self, x):
        return self.fn(x)

    def __repr__(self) -> str:
        return f"Activation({self.name}, kinks={self.kinks})"

    # -- evaluation ---------------------------------------------------------------------------------------------

    def values(self, x: np.ndarray) -> np.ndarray:
        """fn(x) in float64, NumPy in and out."""
        return _batched(self._value, x, 1)[0]

    def values_slopes(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """fn(x) and its a.e. derivative in float64, NumPy in and out."""
        value, slope = _batched(self._both, x, 2)
        return value, slope

    @functools.cached_property
    def prime(self) -> "Activation":
        """The a.e. derivative, itself an activation."""
        fn = self.fn
        return derived(self, lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),))[1], "'")

    @functools.cached_property
    def square(self) -> "Activation":
        """fn(x)^2."""
        fn = self.fn
        return derived(self, lambda x: fn(x) * fn(x), "^2")

    @functools.cached_property
    def euler(self) -> "Activation":
        """x fn'(x), whose mean is 2 q d/dq E[fn] for a continuous fn."""
        prime = self.prime.fn
        return derived(self, lambda x: x * prime(x), " (x d/dx)")

    # -- smoothness ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def kinks(self) -> tuple[float, ...]:
        """Points where fn or its derivative may jump, in increasing order."""
        found = find_kinks(self.fn)
        points = np.unique(np.concatenate([np.asarray(found), np.asarray(self._declared), np.zeros(0)]))
        if points.size:  # two names of one kink (max inside a where) differ by rounding
            keep = np.concatenate([[True], np.diff(points) > 1e-12 * (1 + np.abs(points[1:]))])
            points = points[keep]
        return tuple(float(p) for p in points)

    @functools.cached_property
    def jumps(self) -> tuple[tuple[float, float], ...]:
        """Pairs (point, fn(point+) - fn(point-)) of the value's jumps."""
        if not self.kinks:
            return ()
        at = np.asarray(self.kinks)
        step = np.where(at == 0, 1e-20, 8 * np.spacing(np.abs(at)))
        low, high = self.values(at - step), self.values(at + step)
        around = np.abs(self.values(np.stack([at - 0.5, at + 0.5, at - step, at + step]))).max(axis=0)
        jump = np.where(np.abs(high - low) > 1e-9 * around, high - low, 0.0)
        # a jump is there from further away too; 0/0 in a derivative (sinc' at 0) is not
        wide = 1e-6 * (1 + np.abs(at))
        away = self.values(at + wide) - self.values(at - wide)
        jump = np.where(np.abs(away - jump) < 0.1 * np.abs(jump) + 1e-4 * around, jump, 0.0)
        return tuple((float(p), float(j)) for p, j in zip(at, jump, strict=True) if j)

    @functools.cached_property
    def grows_fast(self) -> bool:
        """Whether fn outgrows every moderate power of x, so that the Gaussian must be followed far out."""
        with np.errstate(over="ignore", invalid="ignore"):
            far, near = (np.abs(self.values(np.array([-x, x]))) for x in (24.0, 12.0))
        return bool(np.any(~(far <= 2.0**10 * np.maximum(near, 1e-300)) & (far > 1.0)))

    def breaks(self, u_max: float) -> np.ndarray:
        """Edges of cells covering [-u_max, u_max] on each of which fn and fn' are resolved to 13 digits."""
        octave_max = max(0, int(np.ceil(np.log2(max(u_max, 1.0)))))
        for octave in range(octave_max + 1):
            if octave not in self._cells:
                self._cells[octave] = self._resolve(octave)
        edges = np.unique(np.concatenate([self._cells[o] for o in range(octave_max + 1)]))
        return edges[np.abs(edges) <= u_max]

    def _resolve(self, octave: int) -> np.ndarray:
        outer, inner = 2.0**octave, (2.0 ** (octave - 1) if octave else 0.0)
        sides = [np.array([inner, outer]), np.array([-outer, -inner])]
        kinks = np.asarray(self.kinks)
        todo = []
        for low, high in sides:
            cuts = np.concatenate([[low], kinks[(kinks > low) & (kinks < high)] if kinks.size else [], [high]])
            todo += list(zip(cuts[:-1], cuts[1:], strict=True))
        cells = np.array(todo)
        done = [cells.ravel()]
        count = depth = 0
        while cells.size:
            unresolved = self._unresolved(cells, 1e-9 if depth > 8 else 0.0)
            depth += 1
            done.append(cells[~unresolved].ravel())
            split = cells[unresolved]
            tiny = (split[:, 1] - split[:, 0]) < 1e-11 * np.maximum(1.0, np.abs(split).max(axis=1))
            done.append(split[tiny].ravel())  # a kink that no comparison showed: now isolated to rounding
            split = split[~tiny]
            count += len(split)
            if count > _MAX_CELLS:
                raise QuadratureError(
                    f"{self.name} oscillates or jumps too often between |u| = {inner:g} and {outer:g} "
                    f"(more than {_MAX_CELLS} cells).",
                    "activations that are smooth between finitely many kinks on the range |u| <= 12 sqrt(q).",
                    "the Gaussian expectation would need more quadrature nodes than can be checked; a function that "
                    "casts to float32 inside looks the same, because its rounding is noise in float64.",
                    "use a smaller q, keep the dtype of x inside the function, or pass sin, cos and exp alone: their "
                    "closed forms hold at every q.",
                )
            middle = split.mean(axis=1)
            cells = np.concatenate([np.stack([split[:, 0], middle], 1), np.stack([middle, split[:, 1]], 1)])
        return np.unique(np.concatenate(done))

    def _unresolved(self, cells: np.ndarray, noise: float) -> np.ndarray:
        """Which cells to halve. `noise`, relative: what halving has not removed so far is rounding, not structure.

        The second derivative of gelu as JAX writes it carries x^5 (1 - tanh^2), 1e-9 where tanh saturates at x = 50.
        """
        nodes, _ = legendre(ORDER)
        middle, half = cells.mean(axis=1, keepdims=True), np.diff(cells, axis=1) / 2
        both = np.stack(self.values_slopes(middle + half * nodes))  # (2, cells, nodes)
        if not np.all(np.isfinite(both)):
            where = (middle + half * nodes)[~np.isfinite(both).all(axis=0)]
            raise QuadratureError(
                f"{self.name} or its derivative is NaN or infinite at x = {where[np.argmin(np.abs(where))]:.6g}.",
                "activations that are finite wherever the Gaussian has weight, |x| <= 12 sqrt(q).",
                "the expectation would be NaN.",
                "use a numerically stable form (jax.nn.sigmoid, jax.nn.softplus, jnp.where with a safe inner value), "
                "or a smaller q.",
            )
        size = np.abs(both).max(axis=2)
        self._amplitude = np.maximum(self._amplitude, size.max(axis=1))
        tail = np.abs(both @ legendre_transform(ORDER)[:, ORDER - 5 :]).max(axis=2)
        value, slope = np.maximum(self._amplitude, 1e-300)
        position = 2e-15 * np.abs(cells).max(axis=1) * slope / value  # x itself is rounded
        # second derivatives as JAX writes them (1 - tanh^2 where tanh saturates) carry 1e-13 of rounding
        floor = np.stack([(1e-14 + position + noise) * value, (1e-12 + position + noise) * slope])
        # where f is nothing beside its amplitude, noise is no structure: gelu' as JAX writes it is 1e-13 at x = -20
        nothing = size < 1e-12 * np.array([[value], [slope]])
        return np.any((tail > np.array([[1e-13], [1e-12]]) * size + floor) & ~nothing, axis=0)

    def _check_finite(self) -> None:
        far = np.geomspace(1e-6, _NAN_FREE, 40)
        x = np.concatenate([-far, far, np.linspace(-16, 16, 161)])
        value, slope = self.values_slopes(x)
        with np.errstate(invalid="ignore"):
            self._amplitude = np.array(
                [np.abs(f[(np.abs(x) < 16) & np.isfinite(f)]).max(initial=0) for f in (value, slope)]
            )
        bad = ~np.isfinite(value) | (~np.isfinite(slope) & (x != 0))
        if np.any(bad):
            first = x[bad][np.argmin(np.abs(x[bad]))]
            raise InputError(
                f"phi = {self.name} gives {value[x == first][0]:g} with derivative {slope[x == first][0]:g} "
                f"at x = {first:.6g}.",
                "a function that is finite, with a finite derivative, on the whole real line.",
                "a Gaussian pre-activation reaches every real number, so the expectation would be NaN.",
                "define it on the whole line, e.g. with jnp.where(x > 0, f(jnp.where(x > 0, x, 1.0)), 0.0).",
            )


def derived(parent: Activation, fn: Any, suffix: str) -> Activation:
    """A function with the kinks of its parent."""
    child = Activation.__new__(Activation)
    child.fn, child.name = fn, parent.name + suffix
    child._declared = ()
    child.kinks = parent.kinks
    child._value = jax.jit(fn)
    child._both = jax.jit(lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),)))
    child._cells, child._amplitude = {}, np.zeros(2)
    x = np.linspace(-16, 16, 254)
    with np.errstate(invalid="ignore"):
        child._amplitude = np.array([np.abs(f[np.isfinite(f)]).max(initial=0) for f in child.values_slopes(x)])
    return child


@functools.lru_cache(maxsize=512)
def _analysed(phi) -> Activation:
    return Activation(phi)


def as_activation(phi) -> Activation:
    """`phi` as an `Activation`; one function object is analysed once."""
    if isinstance(phi, Activation):
        return phi
    try:
        hash(phi)
    except TypeError:
        return Activation(phi)
    return _analysed(phi)


def _batched(fn, x, outputs: int) -> list[np.ndarray]:
    x = np.asarray(x, np.float64)
    flat = x.ravel()
    result = [np.empty(flat.shape) for _ in range(outputs)]
    with float64():
        for start in range(0, flat.size, _SIZES[-1]):
            part = flat[start : start + _SIZES[-1]]
            size = next(s for s in _SIZES if s >= part.size)
            out = fn(jnp.asarray(np.pad(part, (0, size - part.size), constant_values=0.5)))
            for target, value in zip(result, out if outputs > 1 else (out,), strict=True):
                target[start : start + part.size] = np.asarray(value)[: part.size]
    return [r.reshape(x.shape) for r in result]


def _check_elementwise(fn, name: str) -> None:
    def refuse(why: str):
        return NotElementwiseError(
            f"phi = {name} is not an elementwise function: {why}.",
            "a real function applied to each entry on its own: shape (...) -> (...), same floating dtype.",
            "the theory applies phi to independent Gaussian pre-activations, one at a time.",
            "pass a function such as jnp.tanh; softmax, norms and gates belong to the model, see ij.kernel_fn.",
        )

    x = np.array([[-1.7, -0.6, 0.2], [0.45, 1.3, 2.6]])
    with float64():
        try:
            out = fn(jnp.asarray(x))
        except Exception as error:
            raise refuse(
                f"it fails on an array of shape (2, 3) with {type(error).__name__}: {str(error)[:200]}"
            ) from error
        if not hasattr(out, "dtype") or not hasattr(out, "shape"):
            raise refuse(f"it returns {type(out).__name__}, not an array")
        if tuple(out.shape) != x.shape:
            raise refuse(f"it maps shape (2, 3) to {tuple(out.shape)}")
        if not jnp.issubdtype(out.dtype, jnp.floating):
            raise refuse(f"it maps float64 to {out.dtype}")
        if is_traced(out):
            raise TracedParameterError(*refuse("it closes over a traced value, so it has no definite values").parts)
        try:
            alone = np.stack([np.asarray(fn(jnp.asarray(v))) for v in x.ravel()]).reshape(x.shape)
        except Exception as error:
            raise refuse(f"it fails on a scalar with {type(error).__name__}: {str(error)[:200]}") from error
        if not np.allclose(np.asarray(out), alone, rtol=1e-6, atol=1e-6, equal_nan=True):
            raise refuse("an entry of its result depends on the other entries")
