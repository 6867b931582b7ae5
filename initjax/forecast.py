r"""One forecast for one model: will it train at this depth, at which learning rate, and how long does it take?

Every number stands beside the assumption that it rests on and beside what is known about how often that assumption
serves: the rules were held against 240 networks that were trained after their forecast (benchmarks/trainability.py,
docs/trainability.md), and those counts are quoted here.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from initjax.errors import InputError
from initjax.inspection import Inspection, inspect

EFOLDS = 6.0  # of the gradient's square: in the ordered phase this is Schoenholz's depth of 6 xi
FLAT = 1e-3  # |log chi| a layer below which a network is at criticality as far as any depth can tell


class Claim(NamedTuple):
    """One number of a forecast.

    Attributes
    ----------
    value : the number; inf where nothing limits it.
    unit : what it counts.
    assumption : what it rests on.
    confidence : how far that has been found to hold.
    """

    value: float
    unit: str
    assumption: str
    confidence: str


class Bin(NamedTuple):
    """Of calibration networks with a `log_gain` up to `below`: their number, and the share that trained."""

    below: float
    networks: int
    trained: float


# benchmarks/results/trainability.json, "e-folds" and "rate"; a test holds them together
CALIBRATION = (Bin(1, 44, 0.977), Bin(3, 54, 0.741), Bin(6, 35, 0.514), Bin(12, 34, 0.059), Bin(1e6, 73, 0.0))
RUNS, BURST_BELOW_HALF, BURST_ABOVE_TWICE = 720, 0.0, 0.573


@dataclasses.dataclass(frozen=True)
class Trainability:
    """What an initialization promises for training; made by `trainability`.

    Attributes
    ----------
    depth : layers (or repeated blocks) of the model; `unit` says which.
    log_gain : |log of the product of chi| over them: e-folds of the gradient's square from last to first.
    chance : share of the calibration networks with a like `log_gain` that trained at some learning rate.
    max_depth : `Claim`: depth at which `log_gain` would reach 6.
    max_learning_rate : `Claim`: largest stable learning rate of gradient descent on 1/(2n) sum |f - y|^2.
    slowest_mode : `Claim`: steps in which the slowest kept mode falls by a factor e.
    learning_rate : the rate that `slowest_mode` is for; `stable`: whether it is below the largest stable one.
    kept, modes : number of kept modes, and of all.
    verdict : all of it in a sentence.
    notes : what was not predicted, or is doubtful.
    report : the `Inspection` behind it.
    """

    depth: int
    unit: str
    log_gain: float
    chance: float
    max_depth: Claim
    max_learning_rate: Claim
    slowest_mode: Claim
    learning_rate: float
    stable: bool
    kept: int
    modes: int
    verdict: str
    notes: tuple[str, ...]
    report: Inspection = dataclasses.field(repr=False)

    def to_dict(self) -> dict:
        """The forecast as dicts, lists, numbers and strings, without the report behind it."""
        answer = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "report"}
        claims = {name: value._asdict() for name, value in answer.items() if isinstance(value, Claim)}
        return answer | claims | {"notes": list(self.notes)}

    def table(self) -> Any:
        """The forecast for a terminal, as a rich renderable (`rich.print(forecast.table())`)."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        rows = Table(title="Trainability", title_justify="left", box=box.SIMPLE, show_header=False, pad_edge=False)
        rows.add_column(no_wrap=True)
        rows.add_column(overflow="fold")
        for name in ("max_depth", "max_learning_rate", "slowest_mode"):
            claim: Claim = getattr(self, name)
            value = "no limit in" if math.isinf(claim.value) and name == "max_depth" else f"{claim.value:.3g}"
            rows.add_row(_TITLES[name], Text(f"{value} {claim.unit}", style="bold"))
            rows.add_row("", Text(f"if: {claim.assumption}"))
            rows.add_row("", Text(f"known: {claim.confidence}"))
        return Group(rows, Text(f"{self.verdict}\n"), *(Text(f"Note: {note}\n") for note in self.notes))


_TITLES = dict(
    max_depth="maximum trainable depth",
    max_learning_rate="largest stable learning rate",
    slowest_mode="slowest kept mode",
)


def trainability(
    model: Any,
    inputs: Any,
    *,
    learning_rate: float | None = None,
    key: Any = None,
    keep: float = 0.99,
    seeds: int = 4,
    apply_kwargs: dict | None = None,
    rngs: Any = None,
) -> Trainability:
    r"""Forecast whether, at which rate and how fast a model trains from its initialization.

    * Depth: the square of the gradient changes by chi a layer; after 1 / |log chi| layers it has changed e-fold. The
      network is held trainable up to 6 of these, in the ordered phase 6 xi of Schoenholz et al. 2017.
    * Rate: 2 n / lambda_max of the tangent kernel, the limit of gradient descent on 1/(2n) sum |f - y|^2.
    * Time: a mode with eigenvalue lambda falls as |1 - rate lambda / n|^t. Kept are the largest eigenvalues that make
      up `keep` of the trace; the slowest of them sets the time.

    Parameters
    ----------
    model : a linen module, an nnx module, a factory `lambda rngs: Model(rngs=rngs)`, or a pair `(init_fn, apply_fn)`.
    inputs : batch of n >= 2 examples, or a tuple or dict of call arguments; 16 to 64 tell enough.
    learning_rate : of full-batch gradient descent; None: half the largest stable one.
    key : random key of the measured networks; None for key 0.
    keep : share of the kernel's trace that the kept modes make up, in (0, 1].
    seeds : random networks to measure, see `inspect`.
    apply_kwargs, rngs : as in `kernel_fn`.

    Returns
    -------
    Trainability, with `.table()` and `.to_dict()`.

    Raises
    ------
    InputError : a rate that is not positive, `keep` outside of (0, 1], fewer than two inputs; a model or inputs that do
        not fit; a network whose tangent kernel vanishes, or is NaN or infinite.

    Accuracy
    --------
    Each claim says what it rests on and how often that served. Where the exact theory refuses the model, depth and
    kernel are measured on random networks instead, and the claim says so.

    Examples
    --------
    >>> import jax
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> lecun = nn.initializers.lecun_normal()
    >>> hidden = [f for _ in range(10) for f in (nn.Dense(64, kernel_init=lecun), nn.relu)]
    >>> model = nn.Sequential([*hidden, nn.Dense(1)])
    >>> x = jax.random.normal(jax.random.key(0), (8, 16))
    >>> forecast = ij.trainability(model, x)
    >>> print(f"{forecast.depth} {forecast.unit}, at most {forecast.max_depth.value:.1f}")  # 6 / log 2
    11 layers, at most 9.7

    References
    ----------
    Schoenholz et al. 2017 (arXiv:1611.01232), section 5; Lee et al. 2019 (arXiv:1902.06720), section 2.2; Xiao,
    Pennington, Schoenholz 2020 (arXiv:1912.13053), section 3.
    """
    from initjax.spectrum import max_learning_rate

    _check(inputs, learning_rate, keep)
    key = jax.random.key(0) if key is None else key
    options = dict(apply_kwargs=apply_kwargs, rngs=rngs)
    report = inspect(model, inputs, key=key, kernels=False, seeds=seeds, **options)
    depth, unit, chi, how = _rate_of_depth(report)
    log_gain = abs(math.log(chi)) * (depth - 1)
    ntk, source = _kernel(model, inputs, report, key, options)
    n = len(ntk)
    limit = float(max_learning_rate(ntk, n))
    if not 0 < limit < math.inf:
        raise InputError(
            f"a network whose tangent kernel has the largest eigenvalue {2 * n / limit:.3g}",
            "a kernel with a positive finite eigenvalue",
            "otherwise gradient descent does not move it, or cannot be stable",
            "look for the dead or overflowing layer with ij.inspect",
        )
    rate = limit / 2 if learning_rate is None else float(learning_rate)
    values = np.linalg.eigvalsh(ntk)[::-1]
    kept = int(np.searchsorted(np.cumsum(values), keep * values.sum() * (1 - 1e-12)) + 1)
    factor = abs(1 - rate * max(float(values[min(kept, n) - 1]), 0.0) / n)
    stable = rate < limit
    steps = -1 / math.log(factor) if 0 < factor < 1 and stable else 0.0 if factor == 0 else math.inf
    found = next((b for b in CALIBRATION if log_gain < b.below), CALIBRATION[-1])
    rate_of_chi = abs(math.log(chi))
    max_depth = math.inf if rate_of_chi < FLAT else 1 + EFOLDS / rate_of_chi
    spread = [layer.q_std / layer.q for layer in report.layers if layer.q_std is not None and layer.q]
    notes = list(report.notes) + ([] if report.refusal is None else [f"No exact theory: {report.refusal}"])
    if spread and spread[-1] > 0.5:
        notes.append(
            f"at these widths the last layer's q varies by {100 * spread[-1]:.0f} % over networks: what holds on "
            "average describes no single one; wider layers are needed before depth can be trusted"
        )
    return Trainability(
        depth=depth,
        unit=unit,
        log_gain=log_gain,
        chance=found.trained,
        max_depth=Claim(
            max_depth,
            unit,
            f"chi = {chi:.4g} a layer, {how}; trainable up to {EFOLDS:g} e-folds of the gradient's square",
            f"{found.trained:.0%} of {found.networks} calibration networks with a like number of e-folds "
            f"({log_gain:.2g}) trained",
        ),
        max_learning_rate=Claim(
            limit,
            "a step",
            f"gradient descent on 1/(2n) sum |f - y|^2, linearised network; kernel {source}",
            f"of {RUNS} calibration runs {BURST_BELOW_HALF:.0%} exploded below half the limit, {BURST_ABOVE_TWICE:.0%} "
            "above twice the limit",
        ),
        slowest_mode=Claim(
            steps,
            "steps",
            f"rate {rate:.3g}; {min(kept, n)} of {n} modes carry {keep:.0%} of the kernel's trace; the kernel stays as "
            "it is",
            "exact for the linearised network; feature learning usually makes it faster, see ij.compare_to_training",
        ),
        learning_rate=rate,
        stable=stable,
        kept=min(kept, n),
        modes=n,
        verdict=_verdict(depth, unit, max_depth, found, rate, limit, steps),
        notes=tuple(notes),
        report=report,
    )


def _verdict(depth, unit, max_depth, found: Bin, rate, limit, steps) -> str:
    where = "within" if depth <= max_depth else "beyond"
    most = "no depth limit" if math.isinf(max_depth) else f"the limit of {max_depth:.3g}"
    told = f"{depth} {unit}, {where} {most}: {found.trained:.0%} of comparable networks trained."
    if rate >= limit:
        return f"{told} The rate {rate:.3g} is above the largest stable one, {limit:.3g}: expect divergence."
    return f"{told} At rate {rate:.3g} the slowest kept mode takes {steps:.3g} steps for a factor e."


def _rate_of_depth(report: Inspection) -> tuple[int, str, float, str]:
    """Depth, its unit, chi for each, and where chi is from."""
    for block in report.blocks:
        if 2 * block.count > len(report.layers):
            continue  # blocks of one layer are layers
        if block.chi is not None and 8 * block.count >= len(report.layers):
            return block.count, f"blocks {block.name}", block.chi, "predicted at infinite width"
        if block.chi is None and block.chi_measured:
            return block.count, f"blocks {block.name}", block.chi_measured, "measured"
    known = [layer.chi for layer in report.layers[1:] if layer.chi is not None and layer.chi > 0]
    depth = len(report.layers)
    if known and len(known) == depth - 1:
        return depth, "layers", math.exp(math.fsum(map(math.log, known)) / len(known)), "predicted at infinite width"
    ratio = report.gradient_ratio_measured
    if ratio is not None and depth > 1 and math.isfinite(ratio.mean):
        return depth, "layers", 10 ** (ratio.mean / (depth - 1)), f"measured on {report.networks} networks"
    if depth <= 1:
        return max(depth, 1), "layers", 1.0, "a single layer has no depth to lose"
    raise InputError(
        f"a model whose gradients vanish or are not finite: chi is {[layer.chi for layer in report.layers]}",
        "a network through which a gradient passes",
        "depth scales are rates of its growth",
        "look for the dead or overflowing layer with ij.inspect",
    )


def _kernel(model, inputs, report: Inspection, key, options) -> tuple[np.ndarray, str]:
    if report.refusal is None:
        from initjax.infinite import kernel_fn

        kernel = kernel_fn(model, inputs, **options)(inputs, get="ntk").ntk
        return np.asarray(kernel, np.float64), "at infinite width"
    from initjax.inspection import measured_kernels
    from initjax.trace.flax import as_functional

    found = measured_kernels(as_functional(model, inputs, **options), inputs, key, 2)
    kernel = np.mean(found, axis=0)
    if not np.all(np.isfinite(kernel)):
        raise InputError(
            "a network whose tangent kernel has entries that are NaN or infinite",
            "a network with finite gradients on these inputs",
            "rates and times are read from its eigenvalues",
            "look for the overflowing layer with ij.inspect",
        )
    return kernel, f"measured, mean of {len(found)} networks"


def _check(inputs, learning_rate, keep) -> None:
    leaves = jax.tree.leaves(inputs)
    if not leaves or np.ndim(leaves[0]) == 0 or len(leaves[0]) < 2:
        raise InputError(
            f"inputs of the shapes {[np.shape(leaf) for leaf in leaves]}",
            "a batch of at least two examples",
            "modes of training are patterns over examples",
            "give 16 to 64 of the data",
        )
    real = isinstance(learning_rate, int | float | np.number) and not isinstance(learning_rate, bool)
    if learning_rate is not None and not (real and 0 < learning_rate < math.inf):
        raise InputError(
            f"learning_rate = {learning_rate!r}",
            "a positive finite number, or None",
            "it is the step of gradient descent",
            "leave it out for half the largest stable one",
        )
    if not (isinstance(keep, int | float | np.number) and 0 < keep <= 1):
        raise InputError(
            f"keep = {keep!r}",
            "a share in (0, 1]",
            "modes are kept until they make up that much of the kernel's trace",
            "leave it at 0.99",
        )
