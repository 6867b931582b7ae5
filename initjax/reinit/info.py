"""What a rule is told about a parameter: its role, its fans, which of its axes count copies, its place in the model.

With the model these come from the traced program. Without it they follow from the shapes of the layer's kernel and
bias, and where these allow two readings of different fans, that is an error and not a guess.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from initjax.errors import InputError
from initjax.reinit.tree import Leaf
from initjax.trace.flax import as_functional, layer_of
from initjax.trace.initstats import read_draw
from initjax.trace.residual import Branch, branches
from initjax.trace.uses import CONTRACTIONS, Survey, Use, survey

WINDOW = 11  # square windows up to this size are taken for convolutions where no bias tells


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """One parameter, as predicates and actions of rules see it.

    Attributes
    ----------
    path : such as `Dense_0/kernel`.
    shape, dtype, value : of the leaf before the rules act; `value` may be a `ShapeDtypeStruct`.
    variable : type of the nnx Variable around it, None in linen trees.
    kind : "kernel" (meets data in a product or convolution), "embedding", "bias", "scale" or "other".
    copies, window, inputs, outputs : axes of the leaf by role; `copies` of a scan, vmap or batched layer.
    fan_in, fan_out : terms of one output's sum, and outputs of one input; None for what is no kernel.
    from_model : whether roles and fans were read from the traced program.
    depth : number of contractions in front of its first use (0: it meets the raw inputs); None without the model.
    doubt : why its fan is not known, "" where it is.
    keys, box : the path's keys, and the nnx Variable or other box around the value.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    value: Any
    variable: type | None
    kind: str
    copies: tuple[int, ...]
    window: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    fan_in: float | None
    fan_out: float | None
    from_model: bool
    depth: int | None
    doubt: str = ""
    keys: tuple = ()
    box: Any = dataclasses.field(default=None, repr=False, compare=False)
    _traced: "Traced | None" = dataclasses.field(default=None, repr=False, compare=False)
    _sibling: Callable[[str], Any] | None = dataclasses.field(default=None, repr=False, compare=False)
    _all: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def layer(self) -> str:
        """Path of the module that owns it."""
        return layer_of(self.path)

    @property
    def name(self) -> str:
        """Its own name in that module."""
        return self.path.rpartition("/")[2]

    @property
    def traced(self) -> "Traced":
        """The traced model."""
        if self._traced is None:
            raise InputError(
                f"the program around {self.path}, without the model",
                "model= and inputs=",
                "branches and the order of layers are read from the traced program",
                "give the module and an example batch",
            )
        return self._traced

    def beside(self, name: str) -> "ParamInfo | None":
        """The info of another parameter of the same module, None if there is none."""
        return self._all.get(f"{self.path.removesuffix(self.name)}{name}")

    def sibling(self, name: str) -> Any:
        """The new value of another parameter of the same module."""
        if self._sibling is None:
            raise InputError(
                f"the new value of {name} beside {self.path}, asked outside of reinitialize",
                "sibling(...) inside an action of ij.reinitialize",
                "only there are new values drawn",
                "use ij.reinitialize",
            )
        return self._sibling(name)


@dataclasses.dataclass(frozen=True)
class Traced:
    """The traced model behind the rules: uses of every weight, and residual branches, by leaf path."""

    survey: Survey
    branches: tuple[Branch, ...]

    @classmethod
    def of(cls, model: Any, inputs: Any, apply_kwargs: Any = None, rngs: Any = None) -> "Traced":
        found = survey(as_functional(model, inputs, apply_kwargs=apply_kwargs, rngs=rngs))
        return cls(found, branches(found))

    def uses(self, path: str) -> list[Use]:
        return self.survey.of(self.survey.names.index(path))

    def path(self, leaf: int) -> str:
        return self.survey.names[leaf]

    @property
    def last_kernel(self) -> int:
        """The leaf of the last product or convolution."""
        return [use.leaf for use in self.survey.uses if use.kind in CONTRACTIONS][-1]


def describe(leaves: list[Leaf], traced: Traced | None, sibling: Callable | None = None) -> list[ParamInfo]:
    """One ParamInfo for each leaf."""
    shapes = {leaf.path: tuple(leaf.value.shape) for leaf in leaves}
    if traced is not None:
        known = dict(zip(traced.survey.names, traced.survey.shapes, strict=True))
        wrong = {p: s for p, s in shapes.items() if known.get(p) != s}
        if wrong:
            raise InputError(
                f"params with {wrong}, which the given model does not have",
                f"the parameters of this model on these inputs: {known}",
                "fans and branches are read from the model's program",
                "give the model and inputs that these parameters belong to",
            )
    infos, everything = [], {}
    for leaf in leaves:
        roles = _from_program(leaf, traced) if traced is not None else _from_shapes(leaf, shapes)
        here = None if sibling is None else lambda name, path=leaf.path: sibling(path, name)
        infos.append(
            ParamInfo(
                leaf.path,
                tuple(leaf.value.shape),
                leaf.value.dtype,
                leaf.value,
                leaf.variable,
                from_model=traced is not None,
                keys=leaf.keys,
                box=leaf.box,
                _traced=traced,
                _sibling=here,
                _all=everything,
                **roles,
            )
        )
    everything.update((info.path, info) for info in infos)
    return infos


def _roles(kind, copies=(), window=(), inputs=(), outputs=(), fan_in=None, fan_out=None, depth=None, doubt=""):
    return locals()


def _from_program(leaf: Leaf, traced: Traced) -> dict:
    uses = traced.uses(leaf.path)
    if not uses:
        return _roles(_named(leaf), outputs=tuple(range(len(leaf.value.shape))))
    contracted = [use for use in uses if use.kind in CONTRACTIONS]
    first = min(uses, key=lambda use: use.equation)
    if contracted and first.kind != "lookup":
        use = max(contracted, key=lambda use: use.plain)
        fans = {(u.fan_in, u.batch, u.window, u.inputs) for u in contracted}
        doubt = "" if use.plain else "a function of it meets the data, so that its axes have no roles"
        if len(fans) > 1:
            doubt = f"it is used with several fans: {sorted(u.fan_in for u in contracted)}"
        axes = (use.batch, use.window, use.inputs, use.outputs)
        return _roles("kernel", *axes, use.fan_in, use.fan_out, depth=first.depth, doubt=doubt)
    kind = {"lookup": "embedding", "added": "bias", "scaled": "scale"}.get(first.kind, "other")
    if first.kind == "added" and _named(leaf) in ("embedding", "kernel"):
        kind = "embedding"  # a table of positions
    return _roles(kind, first.batch, first.window, first.inputs, first.outputs, depth=first.depth)


def _named(leaf: Leaf) -> str:
    name = str(leaf.keys[-1]) if leaf.keys else ""
    for kind, words in (
        ("bias", ("bias", "b", "beta", "offset")),
        ("scale", ("scale", "gamma", "alpha")),
        ("embedding", ("embedding", "pos_embedding", "table")),
    ):
        if name in words:
            return kind
    return "kernel" if len(leaf.value.shape) >= 2 else "other"


def _from_shapes(leaf: Leaf, shapes: dict[str, tuple[int, ...]]) -> dict:
    shape, kind = tuple(leaf.value.shape), _named(leaf)
    rank = len(shape)
    if kind != "kernel":
        return _roles(kind, outputs=tuple(range(rank)))
    beside = layer_of(leaf.path)
    bias = shapes.get(f"{beside}/bias" if "/" in leaf.path else "bias")
    readings = []  # axes: copies, window, inputs, outputs
    if bias is not None:
        r = len(bias)
        if 0 < r < rank and shape[rank - r :] == bias:
            readings.append(_standard(0, rank, r))
        if 1 < r < rank and shape[: r - 1] == bias[:-1] and shape[-1] == bias[-1]:
            readings.append(_standard(r - 1, rank, 1))
    if not readings and rank == 2:
        readings.append(_standard(0, 2, 1))
    if not readings:
        readings = [_standard(copies, rank, 1) for copies in range(rank - 1)]
        if rank >= 4 and len(set(shape[:-2])) == 1 and shape[0] <= WINDOW:
            readings = readings[:1]
    copies, window, inputs, outputs = readings[0]
    doubt = ""
    if len(readings) > 1:
        doubt = "; or ".join(
            f"{_count(shape, r[0])} copies of {tuple(shape[a] for a in range(rank) if a not in r[0])}"
            if r[0]
            else f"one kernel {shape}"
            for r in readings
        )
    sizes = [math.prod(shape[a] for a in axes) for axes in (window, inputs, outputs)]
    fans = float(sizes[0] * sizes[1]), float(sizes[0] * sizes[2])
    return _roles("kernel", copies, window, inputs, outputs, *fans, doubt=doubt)


def _standard(copies: int, rank: int, outputs: int):
    """Axes of a kernel (copies, window, in, out); with several output axes there is no window."""
    middle = tuple(range(copies, rank - outputs))
    window, inputs = (middle[:-1], middle[-1:]) if outputs == 1 else ((), middle)
    return tuple(range(copies)), window, inputs, tuple(range(rank - outputs, rank))


def _count(shape, axes):
    return math.prod(shape[a] for a in axes)


def copies_apart(init: Callable, key: Any, info: ParamInfo, dtype: Any) -> jax.Array:
    """What an initializer gives for this leaf: one draw for each copy, of the shape (window, in, out) of one copy.

    Several input or output axes (attention heads) are one axis to the initializer, as in Flax's own layers.
    """
    shape = info.shape
    count = _count(shape, info.copies)
    rest = [a for a in range(len(shape)) if a not in info.copies]
    if info.kind == "kernel" and info.inputs and info.outputs and not info.doubt:
        order = [*info.window, *info.inputs, *info.outputs]
        seen = (
            *(shape[a] for a in info.window),
            math.prod(shape[a] for a in info.inputs),
            math.prod(shape[a] for a in info.outputs),
        )
    else:
        order, seen = rest, tuple(shape[a] for a in rest)
    check_stack(init, info)
    if info.copies:
        value = jax.vmap(lambda k: init(k, seen, dtype))(jax.random.split(key, count))
    else:
        value = init(key, seen, dtype)
    if not hasattr(value, "shape") or value.shape != ((count,) if info.copies else ()) + seen:
        from initjax.initializers.protocol import uncalled

        raise uncalled(getattr(init, "__name__", type(init).__name__))
    axes = [*info.copies, *order]
    value = value.reshape(tuple(shape[a] for a in axes))
    return jnp.moveaxis(value, range(len(axes)), axes) if axes != sorted(axes) else value


def check_stack(init: Callable, info: ParamInfo) -> None:
    """Refuse a leaf of two readings, unless both give entries of the same variance."""
    if not info.doubt or len(info.shape) < 2:
        return
    shapes = [info.shape, info.shape[1:]] if len(info.shape) > 2 else [info.shape, info.shape[::-1]]
    read = [variance_of(init, shape, info.dtype) for shape in shapes]
    if None not in read and math.isclose(*read, rel_tol=1e-5, abs_tol=1e-30):  # pyright: ignore
        return
    told = "the program leaves it open" if info.from_model else "without the model or a bias nothing tells which"
    raise InputError(
        f"{info.path} of shape {info.shape}, drawn by an initializer that depends on the fan",
        "a leaf whose fan is known",
        f"{told}: {info.doubt}",
        "give model= and inputs=, or use an action fn(key, info) that knows the layer"
        if not info.from_model
        else "use an action fn(key, info) that knows which fan is meant",
    )


def variance_of(init: Callable, shape: tuple[int, ...], dtype: Any) -> float | None:
    """Variance of the entries that an initializer draws, read and not sampled; None where it cannot be read."""
    std = getattr(init, "std", None)
    if callable(std):
        return float(std(shape)) ** 2  # pyright: ignore[reportArgumentType]
    try:
        stats = read_draw(lambda key: init(key, shape, dtype), dtype)
    except Exception:
        return None
    return None if stats is None or stats.value is not None and stats.value.ndim else stats.variance + stats.mean**2
