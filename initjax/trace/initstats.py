r"""The exact distribution of every weight leaf, read from the initializer's own jaxpr.

An initializer turns random bits into uniforms U and applies elementwise functions. With U = Phi(z), z ~ N(0, 1),
every entry of the leaf is F(z), and mean and variance are integrals over z: no table of initializer names is needed.
What is not of this form (QR of an orthogonal initializer, gathers) is drawn a few times and says so.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from initjax.trace.flax import Functional
from initjax.trace.inline import Equation, Straight, inline
from initjax.trace.pointwise import evaluate, is_pointwise

_SAMPLES = 8  # draws of a leaf that cannot be read, each with its own key


@dataclasses.dataclass(frozen=True)
class LeafStats:
    """The distribution of one weight leaf at initialization.

    Attributes
    ----------
    name, shape, dtype : of the leaf.
    kind : "random" (read from the initializer), "constant", "sampled" (drawn a few times), "estimated" (from the
        values of a finished nnx module), or "structured" (entries not identically distributed).
    mean, variance : of one entry; `variance` is rounded to the intended decimal where float32 constants inside the
        initializer moved it by a few ulp.
    raw_variance : before that rounding.
    gaussian : whether one entry is normally distributed.
    value : a constant leaf's value (0-d if uniform), else None.
    key : identity of the random key; two leaves with the same key are equal, not independent.
    note : how the numbers were obtained, where that is not by reading the initializer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    kind: Literal["random", "constant", "sampled", "estimated", "structured"]
    mean: float
    variance: float
    raw_variance: float
    gaussian: bool = False
    value: np.ndarray | None = None
    key: Hashable = None
    note: str = ""


def leaf_statistics(functional: Functional) -> tuple[LeafStats, ...]:
    """The distribution of every parameter leaf, in the order of `jax.tree.leaves(params)`.

    Parameters
    ----------
    functional : from `as_functional`.

    Returns
    -------
    One `LeafStats` per leaf.

    Accuracy
    --------
    Variances of float32 initializers: about 1e-7 relative before, exact after rounding to the intended decimal.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from initjax.trace.flax import as_functional
    >>> bias, kernel = leaf_statistics(as_functional(nn.Dense(3), jnp.ones((2, 5))))
    >>> bias.kind, kernel.kind, kernel.variance, kernel.gaussian
    ('constant', 'random', 0.2, False)
    """
    names, leaves = functional.leaf_names, jax.tree.leaves(functional.abstract_params)
    if functional.values is not None:
        values = jax.tree.leaves(functional.values)
        pairs = zip(names, values, strict=True)
        return tuple(_estimated(name, np.asarray(value, np.float64), value.dtype) for name, value in pairs)
    program = inline(jax.make_jaxpr(functional.init)(jax.random.key(0)))
    with jax.ensure_compile_time_eval():  # known arrays stay known inside the caller's jit
        stats, values = [], _read(program)
    for name, leaf, output in zip(names, leaves, program.outputs, strict=True):
        value = values[output]
        if isinstance(value, _Draw):
            stats.append(_from_draw(name, leaf, value))
        elif isinstance(value, _Known):
            stats.append(_constant(name, leaf.shape, leaf.dtype, np.asarray(value.array, np.float64)))
        else:
            stats.append(None)
    if None in stats:
        unread = [i for i, entry in enumerate(stats) if entry is None]
        for i, entry in zip(unread, _sampled(functional, unread, names), strict=True):
            stats[i] = entry
    return tuple(stats)


def read_draw(draw, dtype) -> LeafStats | None:
    """The distribution of `draw(key)`, an array of that dtype, if its program can be read; nothing is drawn."""
    program = inline(jax.make_jaxpr(draw)(jax.random.key(0)))
    leaf = program.avals[program.outputs[0]]
    value = _read(program)[program.outputs[0]]
    if isinstance(value, _Draw):
        return _from_draw("", leaf, value)
    return _constant("", leaf.shape, dtype, np.asarray(value.array, np.float64)) if isinstance(value, _Known) else None


# ------------------------------------------------------------------ the walk over one leaf's initializer


@dataclasses.dataclass(frozen=True)
class _Known:
    array: Any


@dataclasses.dataclass(frozen=True)
class _Key:
    path: Hashable


@dataclasses.dataclass(frozen=True)
class _Bits:
    key: Hashable


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Entries are i.i.d. F(z); `values` is F on the nodes of z for `mantissa` random bits."""

    key: Hashable
    values: np.ndarray
    mantissa: int


class _Opaque:
    """Anything the reader does not follow."""


_SAME_ENTRIES = {"reshape", "transpose", "rev", "copy", "copy_p", "stop_gradient", "slice", "squeeze"}
_KEY_STEPS = {"random_fold_in", "random_split", "random_clone", "slice", "squeeze", "reshape", "dynamic_slice"}


def _read(program: Straight) -> dict[int, Any]:
    """What every value of the initializers' program is."""
    env: dict[int, Any] = {number: _Known(value) for number, value in program.constants.items()}
    for number in program.inputs:
        env.setdefault(number, _Key("root"))
    for equation in program.equations:
        operands = [env[number] for number in equation.inputs]
        env.update(zip(equation.outputs, _step(equation, operands, program), strict=True))
    return env


def _step(equation: Equation, operands: list, program: Straight) -> list:
    name, params = equation.name, equation.params
    shapes = [program.avals[number].shape for number in equation.outputs]
    if all(isinstance(x, _Known) for x in operands):
        results = equation.primitive.bind(*[jnp.asarray(x.array) for x in operands], **params)
        return [_Known(r) for r in (results if equation.primitive.multiple_results else [results])]
    if len(shapes) != 1:
        return [_Opaque()] * len(shapes)
    first = operands[0]
    if name in ("random_wrap", "random_unwrap") and isinstance(first, _Key):
        return [first]
    if name in _KEY_STEPS and isinstance(first, _Key):
        rest = operands[1:]
        if all(isinstance(x, _Known) for x in rest):
            return [_Key((name, _hashable(params), tuple(_hashable(x.array) for x in rest), first.path))]
    if name == "random_bits" and isinstance(first, _Key):
        return [_Bits(first.path)]
    if name in ("shift_right_logical", "or") and isinstance(first, _Bits):
        return [first]
    if name == "bitcast_convert_type" and isinstance(first, _Bits):
        mantissa = jnp.finfo(params["new_dtype"]).nmant
        return [_Draw(first.key, 1.0 + _uniform_nodes(mantissa), mantissa)]
    if name == "concatenate" and all(isinstance(x, _Draw) for x in operands):
        one, *rest = [x for x in operands if isinstance(x, _Draw)]
        alike = all(np.array_equal(x.values, one.values) and x.mantissa == one.mantissa for x in rest)
        keys = [one.key, *(x.key for x in rest)]
        if alike and len(set(keys)) == len(keys):  # layers stacked by a scan
            return [_Draw(("stacked", *keys), one.values, one.mantissa)]
    if name in _SAME_ENTRIES and isinstance(first, (_Draw, _Bits)):
        return [first]
    draws = [x for x in operands if isinstance(x, _Draw)]
    sizes = {program.avals[n].size for n, x in zip(equation.inputs, operands, strict=True) if isinstance(x, _Draw)}
    plain = len({(d.key, d.mantissa) for d in draws}) == 1 and sizes == {math.prod(shapes[0])}
    others = [_uniform_value(x) for x in operands if not isinstance(x, _Draw)]
    inputs = [program.avals[n].shape for n in equation.inputs]
    if plain and is_pointwise(equation, inputs, shapes[0]) and None not in others:
        nodes = draws[0].values
        arrays = [x.values if isinstance(x, _Draw) else np.full_like(nodes, _uniform_value(x)) for x in operands]
        return [_Draw(draws[0].key, evaluate(equation, arrays), draws[0].mantissa)]
    if name == "convert_element_type" and isinstance(first, _Draw):
        return [_Draw(first.key, _converted(first.values, params["new_dtype"]), first.mantissa)]
    if name == "broadcast_in_dim" and plain:
        return [first]
    return [_Opaque()]


def _converted(values: np.ndarray, dtype) -> np.ndarray:
    """Floats stay float64 whatever their declared width; integers are truncated, booleans become 0 and 1."""
    if np.dtype(dtype) == bool:
        return values.astype(bool)
    values = values.astype(np.float64)
    return np.trunc(values) if jnp.issubdtype(dtype, np.integer) else values


def _uniform_value(value) -> float | None:
    """The one number a known array is full of, else None."""
    if not isinstance(value, _Known):
        return None
    array = np.asarray(value.array)
    if array.size == 0 or (array != array.flat[0]).any():
        return None
    return array.flat[0] if array.dtype == bool else float(array.flat[0])


def _hashable(value) -> Hashable:
    if isinstance(value, dict):
        return tuple(sorted((k, str(v)) for k, v in value.items()))
    array = np.asarray(value)
    return (str(array.dtype), array.shape, array.tobytes())


# ------------------------------------------------------------------ integrals over the nodes


@functools.cache
def _z_nodes() -> tuple[np.ndarray, np.ndarray]:
    """Composite Gauss-Legendre nodes and N(0, 1) weights on [-9, 9]; fine panels, because F may have kinks."""
    edges = np.linspace(-9.0, 9.0, 181)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    half = np.diff(edges) / 2
    z = ((edges[:-1] + edges[1:]) / 2)[:, None] + half[:, None] * nodes
    w = half[:, None] * weights * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return z.ravel(), w.ravel() / w.sum()


@functools.cache
def _uniform_nodes(mantissa: int) -> np.ndarray:
    """U on the nodes; a uniform of few mantissa bits takes few values, and all of them are enumerated."""
    if mantissa <= 10:
        return np.arange(2**mantissa) / 2**mantissa
    u = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in _z_nodes()[0]])
    return np.clip(u, 0.5**mantissa / 2, 1 - 0.5**mantissa)


def _from_draw(name: str, leaf, draw: _Draw) -> LeafStats:
    values, eps = draw.values, float(jnp.finfo(leaf.dtype).eps)
    if draw.mantissa <= 10:
        z = np.array([_normal_quantile((i + 0.5) / values.size) for i in range(values.size)])
        mean, raw = float(values.mean()), float(values.var())
        gaussian = _is_linear(z, values, 2.0, 0.05)
        return LeafStats(
            name, leaf.shape, leaf.dtype, "random", mean, raw, raw, gaussian, key=draw.key,
            note=f"{leaf.dtype} draws take only {values.size} values; the variance is that of those values",
        )  # fmt: skip
    z, w = _z_nodes()
    mean = float(w @ values)
    raw = float(w @ (values - mean) ** 2)
    gaussian = _is_linear(z, values, 2.5, 100 * eps + 1e-9) and _is_linear(z, values, 4.0, 1e-3)
    if gaussian:
        # the float uniform ends at 1 - 2^-24: that clips the tails, so the slope at the centre is the better reading
        near = (np.abs(z) > 0.1) & (np.abs(z) < 1.0)
        slope = np.mean((values - values[::-1])[near] / (2 * z[near]))
        raw = float(slope**2)
    if abs(mean) < 16 * eps * math.sqrt(raw):
        mean = 0.0
    return LeafStats(
        name, leaf.shape, leaf.dtype, "random", mean, _snap(raw, leaf.shape, 3 * eps, _is_flat(values)), raw, gaussian,
        key=draw.key,
    )  # fmt: skip


def _is_linear(z, values, reach: float, tolerance: float) -> bool:
    inside = np.abs(z) < reach
    slope, offset = np.polyfit(z[inside], values[inside], 1)
    return bool(slope != 0 and np.max(np.abs(values[inside] - offset - slope * z[inside])) < tolerance * abs(slope))


def _is_flat(values) -> bool:
    """Whether F is affine in the uniform."""
    u = _uniform_nodes(52)
    slope, offset = np.polyfit(u, values, 1)
    return bool(slope != 0 and np.max(np.abs(values - offset - slope * u)) < 1e-5 * abs(slope))


def _normal_quantile(u: float) -> float:
    import statistics

    return statistics.NormalDist().inv_cdf(u)


def _snap(variance: float, shape: tuple[int, ...], tolerance: float, flat: bool = False) -> float:
    """The variance the author meant: it or its root is a decimal of at most four digits, over a fan or not.

    Nothing is moved by more than `tolerance`, the rounding of the initializer's own constants.
    """
    window = math.prod(shape[:-2])
    fans = [1.0]
    if len(shape) >= 2:
        fan_in, fan_out = window * shape[-2], window * shape[-1]
        fans += [fan_in, fan_out, (fan_in + fan_out) / 2, math.prod(shape[:-1]), math.prod(shape[1:])]
    best = (5, variance)
    for fan in fans:
        for factor in (1.0, 3.0, 12.0) if flat else (1.0,):  # uniform on (-1, 1): 1/3, on (0, 1): 1/12
            scaled = variance * fan * factor
            for power in (1, 2):
                number = scaled ** (1 / power)
                for digits in range(1, best[0]):
                    rounded = float(f"{number:.{digits - 1}e}") ** power
                    if rounded and abs(rounded / scaled - 1) < tolerance:
                        best = (digits, rounded / (fan * factor))
                        break
    return best[1]


# ------------------------------------------------------------------ leaves that cannot be read


def _constant(name, shape, dtype, value: np.ndarray) -> LeafStats:
    if value.size and (value == value.flat[0]).all():
        value = np.asarray(value.flat[0])
    mean = float(value.mean()) if value.size else 0.0
    return LeafStats(name, tuple(shape), dtype, "constant", mean, 0.0, 0.0, value=value)


def _estimated(name, value: np.ndarray, dtype) -> LeafStats:
    if value.size == 0 or (value == value.flat[0]).all():
        return _constant(name, value.shape, dtype, value)
    variance = float(np.mean(value**2))
    note = (
        f"variance estimated from the {value.size} values of the finished module (relative standard error about "
        f"{math.sqrt(2 / value.size):.1e}); give the factory `lambda rngs: Model(rngs=rngs)` to read the initializer"
    )
    return LeafStats(name, value.shape, dtype, "estimated", 0.0, variance, variance, True, note=note)


def _sampled(functional: Functional, indices: list[int], names) -> list[LeafStats]:
    """Draw the unread leaves a few times; a Frobenius norm that does not vary (orthogonal) is exact."""

    def draw(key):
        leaves = jax.tree.leaves(functional.init(key))
        return [leaves[i] for i in indices]

    with jax.ensure_compile_time_eval():
        compiled = jax.jit(draw)
        draws = [compiled(jax.random.key(seed)) for seed in range(_SAMPLES)]
    found = []
    for position, index in enumerate(indices):
        values = np.stack([np.asarray(d[position], np.float64) for d in draws])
        dtype, shape = draws[0][position].dtype, values.shape[1:]
        still = (values == values[:1]).all(axis=0)
        if still.all():
            found.append(_constant(names[index], shape, dtype, values[0]))
            continue
        norms = np.mean(values.reshape(_SAMPLES, -1) ** 2, axis=1)
        raw, spread = float(norms.mean()), float(norms.std(ddof=1))
        exact = spread < 1e-5 * raw
        variance = _snap(raw, shape, 1e-6) if exact else raw
        how = "its mean square is the same in every draw" if exact else f"standard error {spread / _SAMPLES**0.5:.1e}"
        kind = "structured" if still.any() else "sampled"
        found.append(
            LeafStats(
                names[index],
                shape,
                dtype,
                kind,
                0.0,
                variance,
                raw,
                note=f"initializer not read (QR, gather or several keys): mean square over {_SAMPLES} draws, {how}",
            )  # fmt: skip
        )
    return found
