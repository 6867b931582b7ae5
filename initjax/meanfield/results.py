"""What mean-field functions return: frozen dataclasses of arrays, registered as pytrees.

Text fields (`phase`, `kind`) are strings for scalar input and NumPy arrays of strings for batches; as pytree metadata
they survive `jax.tree.map`. Under a trace they are None: a tracer has no phase yet.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

_TEXT = ("phase", "kind", "note")
T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def result(cls: type[T]) -> type[T]:
    """Frozen dataclass, pytree with numeric leaves and textual metadata, readable repr."""
    cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    leaves = [n for n in names if n not in _TEXT]
    texts = [n for n in names if n in _TEXT]

    def flatten(self):
        aux = tuple(_pack(getattr(self, n)) for n in texts)
        return tuple(getattr(self, n) for n in leaves), aux

    def flatten_with_keys(self):
        children, aux = flatten(self)
        return tuple((jax.tree_util.GetAttrKey(n), c) for n, c in zip(leaves, children, strict=True)), aux

    def unflatten(aux, children):
        fields = dict(zip(leaves, children, strict=True))
        fields.update({n: _unpack(a) for n, a in zip(texts, aux, strict=True)})
        out = object.__new__(cls)
        for name, value in fields.items():
            object.__setattr__(out, name, value)
        return out

    def show(self) -> str:
        return f"{cls.__name__}({', '.join(f'{n}={_short(getattr(self, n))}' for n in names)})"

    cls.__repr__ = show
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _pack(text):
    if isinstance(text, np.ndarray):
        return ("array", text.shape, tuple(text.ravel().tolist()))
    return text


def _unpack(packed):
    if isinstance(packed, tuple) and len(packed) == 3 and packed[0] == "array":
        return np.array(packed[2], dtype="<U15").reshape(packed[1])
    return packed


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.size > 6:
        return f"<{value.dtype} {value.shape}, {np.nanmin(value):.6g} .. {np.nanmax(value):.6g}>"
    if isinstance(value, np.ndarray) and value.size > 6:
        return f"<text {value.shape}>"
    if isinstance(value, (float, np.floating)):
        return f"{value:.10g}"
    if isinstance(value, np.ndarray):
        return np.array2string(value, precision=8, separator=", ")
    return repr(value)


@result
class FixedPoint:
    """Where an infinitely deep network of one layer type ends.

    Attributes
    ----------
    q : attracting pre-activation second moment reached from q0; inf when the variance diverges, 0 when it dies.
    c : attracting correlation of two inputs with equal q; 1 when they merge. nan where the map has no isolated
        attractor (q = 0: cosines freeze; q = inf).
    chi_1 : slope of the correlation map at c = 1, the gradient's second-moment factor per layer.
    chi_q : slope of the variance map at q.
    chi_c : slope of the correlation map at c.
    xi_q, xi_c : depth scales in layers, -1 / ln|chi|; inf at criticality.
    xi_grad : signed gradient depth scale in layers, -1 / ln chi_1: positive vanishing, negative exploding.
    phase : "ordered" (chi_1 < 1), "critical", "chaotic" (chi_1 > 1) or "unbounded" (q diverges).
    """

    q: Any
    c: Any
    chi_1: Any
    chi_q: Any
    chi_c: Any
    xi_q: Any
    xi_c: Any
    xi_grad: Any
    phase: Any


@result
class CriticalPoint:
    """A point of the edge of chaos, chi_1 = 1 at a fixed point q of the variance map.

    Attributes
    ----------
    sigma_w, sigma_b : standard deviations (Var W = sigma_w^2 / fan_in, Var b = sigma_b^2).
    q : pre-activation second moment; 0 for kind "zero", nan for kind "scale-invariant".
    chi_q : slope of the variance map there.
    stable : whether the variance map stays there (|chi_q| < 1, or attraction at chi_q = 1).
    kind : "regular", "scale-invariant" (every q is fixed), "zero" (q = 0) or "half-stable" (chi_q = 1 at q > 0).
    """

    sigma_w: Any
    sigma_b: Any
    q: Any
    chi_q: Any
    stable: Any
    kind: Any


@result
class Trajectory:
    """Signals through `depth` layers; every field has leading axis depth + 1, entry 0 is the input layer.

    Attributes
    ----------
    q : pre-activation second moment.
    c : correlation of two inputs that both start at q0.
    chi : sigma_w^2 E[phi'^2] at q, the gradient's second-moment factor from the next layer to this one.
    gradient : E|dL/dh_l|^2 relative to the last layer, the product of chi from l to depth - 1; gradient[depth] = 1.
        0 or inf where float64 ends; log_gradient goes on.
    one_minus_c : 1 - c with all its digits; c itself rounds to 1 at 1e-16.
    log_one_minus_c, log_gradient : natural logarithms, finite at any depth; -inf only where the argument is exactly 0.
        The first two are None for trajectories of blocks.
    """

    q: Any
    c: Any
    chi: Any
    gradient: Any
    one_minus_c: Any = None
    log_one_minus_c: Any = None
    log_gradient: Any = None
