"""Where every weight meets data in a model's program, and how many terms are summed there: the true fans.

The walk keeps, for every value that depends on weights alone, which axis of which leaf stands along each of its axes.
At an equation that joins such a value with data the roles follow from the primitive: summed axes are inputs, free axes
outputs, shared axes (and axes out of which one index was taken, as in a scan) count independent copies.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from initjax.trace.flax import Functional
from initjax.trace.inline import Equation, Straight, inline

CONTRACTIONS = ("product", "convolution")
LAYOUT = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim convert_element_type copy copy_p stop_gradient rev slice "
    "reduce_precision optimization_barrier sharding_constraint reshard mesh_cast".split()
)


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf under a new layout: along each axis the (leaf axis, size) pieces that make it up; -1 for repeats."""

    leaf: int
    axes: tuple[tuple[tuple[int, int], ...], ...]
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Weights:
    """A value that depends on weights alone; without `views` it is a function of them that is not followed."""

    leaves: frozenset[int]
    views: tuple[View, ...]


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a leaf meets data.

    Attributes
    ----------
    leaf : number of the leaf.
    kind : "product", "convolution", "lookup", "added", "scaled", or "other".
    batch, window, inputs, outputs : axes of the leaf in these roles; `batch` axes count independent copies.
    fan_in : terms in the sum that makes one output; strided transposed convolutions have kernel / stride of them.
    fan_out : outputs that one input takes part in.
    factor : constant between the leaf and the data.
    plain : whether the leaf's own entries (times `factor`) meet the data; else the axes are unknown.
    depth : contractions in front of this one.
    equation : number of the equation.
    primitive : its name.
    """

    leaf: int
    kind: str
    batch: tuple[int, ...]
    window: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    fan_in: float
    fan_out: float
    factor: float
    plain: bool
    depth: int
    equation: int
    primitive: str

    @property
    def role(self) -> tuple:
        """What tells two different uses apart."""
        axes = (self.batch, self.window, self.inputs, self.outputs)
        return (self.kind, axes, self.fan_in, self.fan_out, self.factor, self.plain)


@dataclasses.dataclass(frozen=True)
class Survey:
    """A model's program with the role of every value.

    Attributes
    ----------
    body : the straight-line program of the forward pass.
    names, shapes : of the parameter leaves.
    uses : every meeting of weights and data, in program order.
    weights : number -> what a value that depends on weights alone is made of.
    data : numbers of the values that depend on the inputs.
    """

    body: Straight
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    uses: tuple[Use, ...]
    weights: dict[int, Weights]
    data: frozenset[int]

    def of(self, leaf: int) -> list[Use]:
        """The different uses of one leaf."""
        found: dict[tuple, Use] = {}
        for use in self.uses:
            if use.leaf == leaf:
                found.setdefault(use.role, use)
        return list(found.values())


def survey(functional: Functional) -> Survey:
    """Trace the forward pass on the example inputs and find every use of every weight.

    Parameters
    ----------
    functional : from `as_functional`.

    Returns
    -------
    Survey.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from initjax.trace.flax import as_functional
    >>> model = nn.ConvTranspose(6, (4, 4), (2, 2), use_bias=False)
    >>> (use,) = survey(as_functional(model, jnp.ones((1, 8, 8, 5)))).uses
    >>> use.kind, use.fan_in  # 16 taps of 5 channels, of which a stride of 2 x 2 leaves a quarter
    ('convolution', 20.0)
    """
    params = functional.abstract_params
    body = inline(jax.make_jaxpr(functional.apply)(params, _abstract(functional.example)))
    shapes = tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(params))
    weights: dict[int, Weights] = {}
    depth: dict[int, int] = {}
    numbers = iter(body.inputs)
    for leaf, shape in enumerate(shapes):
        axes = tuple(((axis, n),) for axis, n in enumerate(shape))
        weights[next(numbers)] = Weights(frozenset({leaf}), (View(leaf, axes),))
    depth.update(dict.fromkeys(numbers, 0))
    uses: list[Use] = []
    for index, equation in enumerate(body.equations):
        from_data = [n for n in equation.inputs if n in depth]
        from_weights = [n for n in equation.inputs if n in weights]
        if from_weights and not from_data:
            leaves = frozenset().union(*(weights[n].leaves for n in from_weights))
            views = _moved(equation, weights, body) if len(equation.outputs) == 1 else ()
            weights.update((out, Weights(leaves, views)) for out in equation.outputs)
        elif from_data:
            level = max(depth[n] for n in from_data)
            new = [
                use for n in dict.fromkeys(from_weights) for use in _met(index, equation, n, weights[n], level, body)
            ]
            uses += new
            level += any(use.kind in CONTRACTIONS for use in new)
            depth.update(dict.fromkeys(equation.outputs, level))
    return Survey(body, functional.leaf_names, shapes, tuple(uses), weights, frozenset(depth))


def _abstract(inputs):
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf), inputs)


# ------------------------------------------------------------------ weights among themselves


def _moved(equation: Equation, weights, body: Straight) -> tuple[View, ...]:
    """The views behind an equation on weights and constants; empty where they are not followed."""
    name, params = equation.name, equation.params
    shape = tuple(body.avals[equation.outputs[0]].shape)
    sources = [n for n in equation.inputs if n in weights]
    views = [view for n in sources for view in weights[n].views]
    if any(not weights[n].views for n in sources):
        return ()
    if name == "concatenate" and len(sources) == len(equation.inputs):
        return tuple(views)
    if len(sources) != 1:
        return ()
    if name in ("mul", "div", "neg"):
        factor = _factor(equation, sources[0], body)
        return tuple(dataclasses.replace(v, factor=v.factor * factor) for v in views) if factor else ()
    if name == "dynamic_slice":
        return tuple(_resized(view, shape) for view in views)
    if name not in LAYOUT:
        return ()
    moved = [_laid_out(name, params, view, tuple(body.avals[sources[0]].shape), shape) for view in views]
    return tuple(view for view in moved if view is not None) if None not in moved else ()


def _factor(equation: Equation, weight: int, body: Straight) -> float | None:
    """The constant number that multiplies a weight."""
    if equation.name == "neg":
        return -1.0
    other = [n for n in equation.inputs if n != weight]
    if len(other) != 1 or other[0] not in body.constants or equation.name == "div" and equation.inputs[0] != weight:
        return None
    value = np.asarray(body.constants[other[0]], np.float64)
    if value.size == 0 or (value != value.flat[0]).any() or value.flat[0] == 0:
        return None
    return float(value.flat[0]) if equation.name == "mul" else 1 / float(value.flat[0])


def _laid_out(name, params, view: View, before: tuple[int, ...], shape: tuple[int, ...]) -> View | None:
    axes = view.axes
    if name == "transpose":
        return dataclasses.replace(view, axes=tuple(axes[p] for p in params["permutation"]))
    if name == "broadcast_in_dim":
        new: list[Any] = [((-1, n),) if n > 1 else () for n in shape]
        for axis, target in enumerate(params["broadcast_dimensions"]):
            if before[axis] == shape[target]:
                new[target] = axes[axis]
        return dataclasses.replace(view, axes=tuple(new))
    if name == "slice":
        return _resized(view, shape)
    if name in ("reshape", "squeeze", "expand_dims"):
        if name == "reshape" and params["dimensions"] is not None:
            view = dataclasses.replace(view, axes=tuple(axes[p] for p in params["dimensions"]))
        return _reshaped(view, shape)
    return view


def _size(pieces) -> int:
    return math.prod(n for _, n in pieces)


def _resized(view: View, shape: tuple[int, ...]) -> View:
    """A part of the view: an axis of one piece is shortened, one of several pieces is taken as a part of all."""
    axes = []
    for pieces, n in zip(view.axes, shape, strict=True):
        if _size(pieces) <= n:
            axes.append(pieces)
        elif n == 1:
            axes.append(())
        else:
            axes.append(((pieces[0][0], n),) if len({axis for axis, _ in pieces}) == 1 else ((-2, n),))
    return dataclasses.replace(view, axes=tuple(axes))


def _reshaped(view: View, shape: tuple[int, ...]) -> View | None:
    """Pieces regrouped to new sizes, split where a new axis ends inside one."""
    queue = [piece for pieces in view.axes for piece in pieces if piece[1] != 1]
    axes = []
    for n in shape:
        pieces, left = [], n
        while left > 1:
            if not queue:
                return None
            axis, size = queue.pop(0)
            if left % size == 0:
                pieces.append((axis, size))
                left //= size
            elif size % left == 0:
                pieces.append((axis, left))
                queue.insert(0, (axis, size // left))
                left = 1
            else:
                return None
        axes.append(tuple(pieces))
    return dataclasses.replace(view, axes=tuple(axes)) if not queue else None


# ------------------------------------------------------------------ weights meet data


def _met(index: int, equation: Equation, number: int, value: Weights, depth: int, body: Straight) -> list[Use]:
    """The uses at one equation: of every leaf behind the value."""
    kind, roles, fan_in, fan_out = _roles(equation, number, tuple(body.avals[number].shape))
    found = []
    for leaf in sorted(value.leaves):
        views = [view for view in value.views if view.leaf == leaf]
        axes: tuple = ((), (), (), ())
        plain = False
        if len(views) == 1:
            axes, plain = _axes(views[0], roles, body, kind)
        factor = views[0].factor if plain else 1.0
        batch, window, inputs, outputs = axes
        roles_of = (batch, window, inputs, outputs)
        found.append(Use(leaf, kind, *roles_of, fan_in, fan_out, factor, plain, depth, index, equation.name))
    return found


def _roles(equation: Equation, number: int, shape: tuple[int, ...]) -> tuple[str, dict[int, str], float, float]:
    """Kind of the meeting, role of each axis of the weight's value, fan_in and fan_out."""
    name, params = equation.name, equation.params
    place = equation.inputs.index(number)
    if name == "dot_general" and equation.inputs.count(number) == 1:
        summed, shared = params["dimension_numbers"]
        roles = dict.fromkeys(range(len(shape)), "outputs")
        roles |= dict.fromkeys(summed[place], "inputs") | dict.fromkeys(shared[place], "batch")
        sizes = {r: math.prod(n for axis, n in enumerate(shape) if roles[axis] == r) for r in ("inputs", "outputs")}
        return "product", roles, float(sizes["inputs"]), float(sizes["outputs"])
    if name == "conv_general_dilated" and place == 1 and params["batch_group_count"] == 1:
        out, inner, *window = params["dimension_numbers"].rhs_spec
        roles = dict.fromkeys(window, "window") | {inner: "inputs", out: "outputs"}
        taps = math.prod(shape[axis] for axis in window)
        fan_in = taps * shape[inner] / math.prod(params["lhs_dilation"])
        groups = params["feature_group_count"]
        fan_out = taps * shape[out] / groups / math.prod(params["window_strides"])
        return "convolution", roles | {-1: groups}, fan_in, fan_out
    everything = dict.fromkeys(range(len(shape)), "outputs")
    if name == "gather" and place == 0:
        rows = dict.fromkeys(params["dimension_numbers"].start_index_map, "inputs")
        return "lookup", everything | rows, 1.0, float(math.prod(shape[len(rows) :]))
    kind = {"add": "added", "add_any": "added", "sub": "added", "mul": "scaled", "div": "scaled"}.get(name, "other")
    return kind, everything, 1.0, 1.0


def _axes(view: View, roles: dict[int, Any], body: Straight, kind: str) -> tuple[tuple, bool]:
    """Leaf axes by role, and whether each has one."""
    found: dict[int, str] = {}
    groups = roles.get(-1, 1)
    for axis, pieces in enumerate(view.axes):
        role = roles[axis]
        left = groups if role == "outputs" and len(pieces) > 1 else 1
        for leaf_axis, n in pieces:
            here = role
            if left > 1 and left % n == 0:  # a vmapped convolution: its copies are groups of channels
                here, left = "batch", left // n
            if leaf_axis == -2 or found.setdefault(leaf_axis, here) != here:
                return ((), (), (), ()), False
    if -1 in found and found[-1] in ("inputs", "window"):
        return ((), (), (), ()), False  # one weight for several terms of the sum
    shape = tuple(body.avals[body.inputs[view.leaf]].shape)
    for axis, n in enumerate(shape):
        if axis not in found:  # one index was taken, as a scan does; axes of length 1 have no role of their own
            found[axis] = "batch" if n > 1 else "inputs" if kind in CONTRACTIONS else "outputs"
    by_role = [tuple(a for a in sorted(found) if a >= 0 and found[a] == role) for role in ROLES]
    return tuple(by_role), True


ROLES = ("batch", "window", "inputs", "outputs")
