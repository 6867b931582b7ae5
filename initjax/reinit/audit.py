"""Each weight's true contraction fan, against the fan that its initializer has used."""

import dataclasses
import math
from typing import Any

from initjax.trace.flax import as_functional
from initjax.trace.initstats import LeafStats, leaf_statistics
from initjax.trace.uses import CONTRACTIONS, Use, survey

NUMERATORS = (1.0, 2.0, 1 / 3)  # LeCun and Glorot, He, PyTorch


@dataclasses.dataclass(frozen=True)
class FanRow:
    """One use of one weight.

    Attributes
    ----------
    name, shape : of the leaf.
    kind : "product", "convolution", or "lookup" (one row of a table: its fan is 1).
    variance : of one entry as it meets the data, by the model's own initializer.
    fan : number of terms in the sum that makes one output.
    initializer_fan : the fan that the initializer divided by; None where its variance follows none.
    ratio : initializer_fan / fan, the factor by which the variance is too small; None without an initializer_fan.
    sigma_w : sqrt(variance fan), standard deviation in mean-field scaling.
    copies, inputs, outputs : axes of the leaf that count independent copies, are summed (window included), are free.
    fix : what to do, "" where nothing is to be done.
    note : what the numbers do not say.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    variance: float
    fan: float
    initializer_fan: float | None
    ratio: float | None
    sigma_w: float
    copies: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    fix: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class FanReport:
    """Fans of a whole model; made by `audit_fans`, printable.

    Attributes
    ----------
    rows : one `FanRow` for each different use of each weight, in program order.
    not_followed : weights with two axes or more that do not meet data, or in a way that is not read (a long loop).
    """

    rows: tuple[FanRow, ...]
    not_followed: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[FanRow, ...]:
        """The rows whose initializer has used another fan than the true one."""
        return tuple(row for row in self.rows if row.ratio is not None and not math.isclose(row.ratio, 1, rel_tol=1e-6))

    @property
    def rules(self) -> list:
        """Rules that multiply each wrong weight by sqrt(ratio), for `ij.reinitialize`; they draw nothing."""
        import re

        from initjax.reinit.rule import keep, scale

        fixes = {row.name: scale(math.sqrt(row.ratio or 1.0)) for row in self.wrong}
        return [*((f"^{re.escape(name)}$", action) for name, action in fixes.items()), (..., keep)]

    def to_dict(self) -> dict:
        """The report as dicts, lists, numbers, strings and None."""
        rows = [
            {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(row).items()} for row in self.rows
        ]
        return {"rows": rows, "not_followed": list(self.not_followed)}

    def __repr__(self) -> str:
        width = max([6, *(len(row.name) for row in self.rows)])
        head = f"{'weight':{width}}  {'kind':11}  {'true fan':>8}  {'its fan':>8}  {'ratio':>6}  {'sigma_w':>7}"
        lines = [head]
        for row in self.rows:
            its, ratio = ("-" if v is None else f"{v:.4g}" for v in (row.initializer_fan, row.ratio))
            tail = "".join(f"  {text}" for text in (row.fix, row.note) if text)
            lines.append(
                f"{row.name:{width}}  {row.kind:11}  {row.fan:8.4g}  {its:>8}  {ratio:>6}  {row.sigma_w:7.4g}{tail}"
            )
        if self.not_followed:
            lines.append(f"not followed: {', '.join(self.not_followed)}")
        return "\n".join(lines)


def audit_fans(model: Any, inputs: Any, *, apply_kwargs: dict | None = None, rngs: Any = None) -> FanReport:
    r"""Read each weight's true contraction fan from the traced program and compare its initialized variance.

    The fan is the number of terms in the sum that makes one output: products and Einsum with batch axes, convolutions
    with groups and strides (a transposed one has window / stride^2 terms), scan and vmap stacks, weights used twice.
    Four Flax layers have another fan in mind: DenseGeneral with batch_dims, Einsum with three axes, ConvLocal, and
    ConvTranspose.

    Parameters
    ----------
    model : linen module, nnx module, nnx factory `lambda rngs: Model(rngs=rngs)`, or pair `(init_fn, apply_fn)`.
    inputs : example batch, or a tuple or dict of call arguments.
    apply_kwargs, rngs : as in `kernel_fn`.

    Returns
    -------
    FanReport; `report.wrong` are the rows to look at, `report.rules` the fix for `ij.reinitialize`.

    Raises
    ------
    InputError : a model or inputs that do not fit.

    Accuracy
    --------
    Fans are exact in the interior of a padded image. Variances are read from the initializers (1e-7 relative); which
    fan an initializer has used is inferred from them: one for which variance x fan is 1, 2 or 1/3, the true fan first,
    else that of `variance_scaling`'s default axes. `sigma_w` is free of that inference.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> model = nn.Sequential([nn.ConvTranspose(8, (4, 4), (2, 2)), nn.relu, nn.Conv(8, (3, 3))])
    >>> ij.audit_fans(model, jnp.ones((1, 8, 8, 3)))
    weight           kind         true fan   its fan   ratio  sigma_w
    layers_0/kernel  convolution        12        48       4      0.5  multiply by 2
    layers_2/kernel  convolution        72        72       1        1

    References
    ----------
    LeCun et al. 1998 (Efficient BackProp, section 4.6): the variance of a sum is the number of its terms times theirs.
    """
    functional = as_functional(model, inputs, apply_kwargs=apply_kwargs, rngs=rngs)
    stats = leaf_statistics(functional)
    found = survey(functional)
    rows, seen = [], set()
    order: dict[int, None] = dict.fromkeys(use.leaf for use in found.uses)
    for leaf in order:
        for use in found.of(leaf):
            if use.kind in (*CONTRACTIONS, "lookup"):
                seen.add(leaf)
                rows.append(_row(stats[leaf], use, found.of(leaf)))
    elsewhere = {use.leaf for use in found.uses if use.kind == "other" or not use.plain} | (
        set(range(len(stats))) - {use.leaf for use in found.uses}
    )
    left = [s.name for i, s in enumerate(stats) if i in elsewhere - seen and len(s.shape) > 1]
    return FanReport(tuple(rows), tuple(left))


def _row(stats: LeafStats, use: Use, uses: list[Use]) -> FanRow:
    variance = (stats.variance + stats.mean**2) * use.factor**2
    fan = initializer_fan(stats, use) if use.kind in CONTRACTIONS and use.plain else None
    ratio = fan / use.fan_in if fan is not None else None
    notes = []
    if not use.plain:
        notes.append("a function of the weight meets the data")
    if sum(u.kind in (*CONTRACTIONS, "lookup") for u in uses) > 1:
        notes.append("shared: used in several roles")
    wrong = ratio is not None and not math.isclose(ratio, 1, rel_tol=1e-6)
    return FanRow(
        stats.name,
        stats.shape,
        use.kind,
        variance,
        use.fan_in,
        fan,
        ratio,
        math.sqrt(variance * use.fan_in),
        use.batch,
        (*use.window, *use.inputs),
        use.outputs,
        f"multiply by {math.sqrt(ratio):.4g}" if wrong and ratio is not None else "",
        "; ".join(notes),
    )


def initializer_fan(stats: LeafStats, use: Use) -> float | None:
    """The fan an initializer has divided by, inferred from the variance it gave; None where it has used none."""
    shape, variance, true = stats.shape, stats.variance * use.factor**2, use.fan_in
    if len(shape) < 2 or variance == 0:
        return None
    window = math.prod(shape[:-2])
    default = float(window * shape[-2])
    copies = math.prod(shape[axis] for axis in use.batch)
    glorot = window * (shape[-2] + shape[-1]) / 2
    for fan in (true, default, true * copies, (true + use.fan_out) / 2, glorot, float(window * shape[-1])):
        if any(math.isclose(variance * fan, s, rel_tol=1e-5) for s in NUMERATORS):
            return fan
    std = math.sqrt(variance)
    if default != true and math.isclose(float(f"{std:.1e}"), std, rel_tol=1e-6):
        return None  # a number of two digits, such as 0.02
    return true if math.isclose(default, true) else default
