"""Scales for a whole model, layer by layer: from the infinite-width trace where it holds, else from measurement."""

import dataclasses
import math
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from initjax.errors import InputError, QuadratureError, UnstableCriticalPointWarning, UnsupportedLayerError
from initjax.infinite.kernels import KernelFunction, kernel_fn
from initjax.infinite.settle import settle
from initjax.initializers.orthogonal import scaled_orthogonal
from initjax.initializers.protocol import choice, count
from initjax.reinit.info import ParamInfo, Traced, copies_apart, describe
from initjax.reinit.rule import Action, Rule, Rules, keep
from initjax.reinit.signals import Signal, walk
from initjax.reinit.tree import Leaf
from initjax.trace.flax import as_functional
from initjax.trace.initstats import leaf_statistics
from initjax.trace.jaxpr import is_traced
from initjax.trace.residual import branches
from initjax.trace.uses import CONTRACTIONS, survey

TARGETS = ("critical", "unit_variance", "isometry")
ALPHA = 0.005  # a branch adds at most this part of the stream's energy, so that a block's chi is within 1 % of 1


@dataclasses.dataclass(frozen=True)
class TunedLayer:
    """One layer (or the sum behind a residual branch), before and after.

    Attributes
    ----------
    name : path of the weight that was scaled.
    kind : "layer", "branch" (q and chi of the sum, from shortcut to sum), "embedding", "readout" (left alone).
    factor : the weight is multiplied by it.
    q_before, q_after : mean square of the output.
    chi_before, chi_after : energy of a perturbation over that in front.
    copy : index in a stacked layer, None elsewhere.
    chi_error : standard error of chi_after over the draws; 0 on the exact side.
    """

    name: str
    kind: str
    factor: float
    q_before: float
    q_after: float
    chi_before: float
    chi_after: float
    copy: int | None = None
    chi_error: float = 0.0


class Tuned(Rules):
    """Rules that `tune` has found, with a report of what they do; printable.

    Attributes
    ----------
    layers : tuple of TunedLayer, in program order.
    side : "exact" (infinite width) or "measured".
    target : as asked.
    note : why the exact side does not answer, "" where it does.
    """

    layers: tuple[TunedLayer, ...]
    side: str
    target: str
    note: str

    @property
    def worst(self) -> float:
        """Largest |chi - 1| (for "unit_variance" |q - 1|) after tuning, readout left out."""
        rows = [row for row in self.layers if row.kind != "readout"]
        if self.target == "unit_variance":
            return max(abs(row.q_after - 1) for row in rows if row.kind == "layer")
        return max(abs(row.chi_after - 1) for row in rows if not math.isnan(row.chi_after))

    def to_dict(self) -> dict:
        """The report as dicts, lists, numbers and strings."""
        rows = [dataclasses.asdict(row) for row in self.layers]
        return {"side": self.side, "target": self.target, "note": self.note, "layers": rows}

    def __repr__(self) -> str:
        width = max([5, *(len(row.name) for row in self.layers)])
        lines = [f"tuned for {self.target!r}, {self.side}" + (f" ({self.note})" if self.note else "")]
        lines.append(f"{'layer':{width}}  {'factor':>8}  {'q':>9} -> {'':<9}  {'chi':>8} ->")
        for row in self.layers:
            name = row.name if row.copy is None else f"{row.name}[{row.copy}]"
            lines.append(
                f"{name:{width}}  {row.factor:8.4g}  {row.q_before:9.3g} -> {row.q_after:<9.3g}  "
                f"{row.chi_before:8.4g} -> {row.chi_after:.4g}"
                + (f" +- {row.chi_error:.1g}" if row.chi_error > 0 else "")
                + (f"  {row.kind}" if row.kind != "layer" else "")
            )
        return "\n".join(lines)


def tune(
    model: Any,
    inputs: Any,
    *,
    key: Any,
    target: str = "critical",
    draws: int = 8,
    apply_kwargs: dict | None = None,
    rngs: Any = None,
) -> Tuned:
    r"""Scales for every layer of a model such that signals or gradients keep their size, whatever its architecture.

    Parameters
    ----------
    model : linen module, nnx factory `lambda rngs: Model(rngs=rngs)`, or pair `(init_fn, apply_fn)`; an nnx module is
        taken as its one draw.
    inputs : batch of typical inputs, or a tuple or dict of call arguments; 16 to 64 examples.
    key : random key of the measured draws.
    target : "critical": chi = 1 in every layer. "unit_variance": every layer's output has mean square 1 (AutoInit's
        walk). "isometry": chi = 1 with orthogonal kernels.
        In all of them a residual branch adds 1/2 % to its stream's energy at most, embeddings get mean square 1, and
        the readout is left alone.
    draws : number of random networks behind each measured statistic; more for narrow layers.
    apply_kwargs, rngs : as in `kernel_fn`.

    Returns
    -------
    Tuned: rules for `ij.reinitialize`, with the report (`print(tuned)`, `.layers`, `.worst`). They multiply the
    parameters that the model's own initializers have drawn (for "isometry" they draw kernels anew).

    Raises
    ------
    InputError : an unknown target, a model without layers, perturbations that do not arrive or are not finite.

    Warns
    -----
    UnstableCriticalPointWarning : inputs or draws leave chi = 1 (deep gelu or silu chains without norms and biases).

    Accuracy
    --------
    Plain chains of layers that `kernel_fn` covers: chi to 1e-6 at infinite width ("exact"), to 1e-3 with norms. All
    others: measured over `draws` networks; the report's `after` comes from fresh draws, so that it shows the error,
    about 1/sqrt(draws x units) per layer.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
    >>> x = jax.random.normal(jax.random.key(0), (16, 32))
    >>> tuned = ij.tune(model, x, key=jax.random.key(1))
    >>> tuned.side, [(round(row.chi_before, 3), round(row.chi_after, 3)) for row in tuned.layers]
    ('exact', [(1.0, 1.0), (0.5, 1.0), (0.5, 0.5)])
    >>> params = ij.reinitialize(model.init(jax.random.key(2), x), tuned, jax.random.key(3))
    >>> print(f"{params['params']['layers_2']['kernel'].std() * 8:.1f}")  # sqrt(2), He
    1.4

    References
    ----------
    Schoenholz et al. 2017 (arXiv:1611.01232), chi = 1; Bingham, Miikkulainen 2021 (arXiv:2109.08958), AutoInit;
    He, Doshi, Gromov 2022 (arXiv:2206.13568) for tuning by partial Jacobians.
    """
    choice(target, "target", TARGETS, "it says what every layer should keep")
    draws = count(draws, "draws")
    functional = as_functional(model, inputs, apply_kwargs=apply_kwargs, rngs=rngs)
    if is_traced(*jax.tree.leaves(inputs)):
        raise InputError(
            "traced inputs", "concrete arrays", "scales are found by running the model", "call it outside of jit"
        )
    found = survey(functional)
    traced = Traced(found, branches(found))
    if not any(use.kind in CONTRACTIONS for use in found.uses):
        raise InputError(
            f"a model with the parameters {list(found.names)}, none of which meets data in a product or convolution",
            "a model with layers outside of while loops and scans of more than 256 turns",
            "layers are scaled one after the other",
            "unroll the loop",
        )
    exact, note = None, "the layers do not form a plain chain"
    if _is_chain(traced):
        try:
            exact = _exact(model, functional, traced, inputs, target, apply_kwargs, rngs)
        except (UnsupportedLayerError, QuadratureError) as error:
            note = f"kernel_fn: {error.given}"
    layers = exact or _measured(functional, traced, inputs, key, target, draws)
    bad = [row.name for row in layers if not math.isfinite(row.factor) or row.factor <= 0]
    if bad:
        raise InputError(
            f"no finite scale for {', '.join(bad[:5])}",
            "a model in which perturbations of the inputs reach every layer with finite size",
            "a layer's scale follows from what arrives there; constant or zero kernels pass nothing on",
            "initialize with small random weights first, and give floating-point inputs of moderate size",
        )
    rules = Tuned([*_rules(layers, traced, functional, target), Rule(..., keep)])
    rules.layers, rules.target = tuple(layers), target
    rules.side, rules.note = ("exact", "") if exact else ("measured", note)
    lost = [row for row in layers if row.kind == "layer" and abs(row.chi_after - 1) > 0.1 + 4 * row.chi_error]
    if len(lost) > 2 and target != "unit_variance":
        worst = max(lost, key=lambda row: abs(row.chi_after - 1))
        _warn_of_drift(
            f"on fresh draws chi is off 1 by more than 0.1 in {len(lost)} layers, {worst.chi_after:.3g} in {worst.name}"
        )
    return rules


def _warn_of_drift(given: str) -> None:
    warnings.warn(
        UnstableCriticalPointWarning(
            f"{given}. Accepted: models whose variance returns after a small change. Why: chi = 1 fixes one scale for "
            "each layer; where the variance map is unstable there (gelu and silu without biases or norms), inputs and "
            "draws that differ a little drift apart with depth. Try: a norm, inputs of equal norm (ij.inputs), a "
            "shorter chain, or ij.shaping for this activation."
        ),
        stacklevel=4,
    )


# ------------------------------------------------------------------ the exact side


def _is_chain(traced: Traced) -> bool:
    """Whether every contraction follows the one before it, so that its chi is local."""
    uses = [use for use in traced.survey.uses if use.kind in CONTRACTIONS]
    leaves = [use.leaf for use in uses]
    depths = [use.depth for use in uses]
    simple = all(use.plain and not use.batch for use in uses)
    return not traced.branches and simple and len(set(leaves)) == len(leaves) and depths == list(range(len(depths)))


def _exact(model, functional, traced: Traced, inputs, target, apply_kwargs, rngs) -> list[TunedLayer]:
    kernel = kernel_fn(model, inputs, apply_kwargs=apply_kwargs, rngs=rngs)
    names = [traced.path(use.leaf) for use in traced.survey.uses if use.kind in CONTRACTIONS]

    def read(factors):
        scaled = dict(zip(names, factors, strict=True))
        weights = tuple(
            dataclasses.replace(s, variance=s.variance * scaled.get(s.name, 1.0) ** 2) for s in kernel.weights
        )
        again = KernelFunction(model, functional, weights, kernel.eta)
        again._programs = {k: dataclasses.replace(p, leaves=weights) for k, p in kernel._programs.items()}
        layers = {layer.name: layer for layer in again(inputs, get=("ntk", "layers")).layers}
        rows = [layers[name.rpartition("/")[0] or name] for name in names]
        return np.array([np.mean(r.q) for r in rows]), np.array([np.mean(r.chi) for r in rows])

    def choose(i: int, q: float, chi: float) -> float:
        wrong = q if target == "unit_variance" else chi
        return 1.0 if i == len(names) - 1 or not (wrong > 0 and math.isfinite(wrong)) else 1 / math.sqrt(wrong)

    settled = settle(kernel, inputs, names, choose)
    if settled is not None:
        factors, *now = settled
        _, *before = settle(kernel, inputs, names, lambda *_: 1.0) or settled
        apart = max((float(np.max(chi) / np.min(chi)) for chi in now[1][:-1] if np.all(chi > 0)), default=1.0)
        if apart > 1.5 and target != "unit_variance":
            _warn_of_drift(f"chi is 1 in the mean over inputs, and differs between inputs by a factor {apart:.3g}")
        before, now = (tuple(np.array([np.mean(of) for of in each]) for each in pair) for pair in (before, now))
    else:  # norms: their scales follow from all factors, and keep them from adding up
        factors = np.ones(len(names))
        before = now = read(factors)
        for _ in range(4 * len(names)):
            wrong = now[0] if target == "unit_variance" else now[1]
            if np.isnan(wrong[:-1]).any() or np.abs(wrong[:-1] - 1).max(initial=0) < 1e-3:
                break
            factors[:-1] /= np.sqrt(wrong[:-1])  # exact for each layer alone; the layers in front are settled first
            now = read(factors)
    if np.isnan(now[1][:-1]).any():
        raise UnsupportedLayerError("perturbations that do not arrive", "", "", "")
    kinds = ["layer"] * (len(names) - 1) + ["readout"]
    columns = zip(names, kinds, *np.array([factors, before[0], now[0], before[1], now[1]]).tolist(), strict=True)
    return [TunedLayer(*row) for row in columns]


# ------------------------------------------------------------------ the measured side


def _measured(functional, traced: Traced, inputs, key, target, draws) -> list[TunedLayer]:
    def params(key):
        if functional.values is not None:
            return [jax.tree.leaves(functional.values)]
        trees = [functional.init(k) for k in jax.random.split(key, draws)]
        found = [jax.tree.leaves(tree) for tree in trees]
        if target == "isometry":
            stats = leaf_statistics(functional)
            for i, leaves in enumerate(found):
                for use in traced.survey.uses:
                    if use.kind in CONTRACTIONS:
                        info = _info(traced, use.leaf, leaves[use.leaf])
                        sigma = math.sqrt(stats[use.leaf].variance * (info.fan_in or 1))
                        k = jax.random.fold_in(jax.random.fold_in(key, i), use.leaf)
                        leaves[use.leaf] = copies_apart(scaled_orthogonal(sigma), k, info, info.dtype)
        return found

    keys = jax.random.split(key, 4)
    first = params(keys[0])

    def wanted(signal: Signal, alpha: float | None) -> float:
        if alpha is not None:
            return math.sqrt(min(1.0, ALPHA / alpha)) if alpha > 0 else 1.0
        if signal.kind == "readout":
            return 1.0
        size = signal.q if target == "unit_variance" or signal.kind == "embedding" else signal.chi
        return 1 / math.sqrt(size) if size > 0 and math.isfinite(size) else math.nan if size == size else 1.0

    before = walk(traced, first, inputs, keys[1], lambda signal, alpha: 1.0)
    tuned = walk(traced, first, inputs, keys[1], wanted)
    total: dict[tuple, float] = {}
    for row in tuned:
        if (row.name, row.copy, row.kind) not in total:
            total[row.name, row.copy, row.kind] = row.factor

    def again(signal: Signal, alpha: float | None) -> float:
        kind = "branch" if alpha is not None else signal.kind
        return total[signal.name, signal.copy, kind]

    after = walk(traced, params(keys[2]), inputs, keys[3], again)
    return [
        TunedLayer(b.name, b.kind, a.factor, float(b.q), float(a.q), b.chi, a.chi, b.copy, a.error)
        for b, a in zip(before, after, strict=True)
    ]


def _info(traced: Traced, leaf: int, value) -> ParamInfo:
    path = traced.path(leaf)
    return describe([Leaf(path, tuple(path.split("/")), value)], traced)[0]


def _rules(layers: list[TunedLayer], traced: Traced, functional, target: str) -> list[Rule]:
    """One rule for each weight: the product of its factors, a vector along the copies of a stacked layer."""
    found: dict[str, dict[tuple, float]] = {}
    for row in layers:
        found.setdefault(row.name, {}).setdefault((row.copy, row.kind == "branch"), row.factor)
    stats = {s.name: s for s in leaf_statistics(functional)} if target == "isometry" else {}
    contracted = {traced.path(use.leaf) for use in traced.survey.uses if use.kind in CONTRACTIONS}
    rules = []
    for name, factors in found.items():
        copies = sorted({copy for copy, _ in factors if copy is not None})
        numbers = [math.prod(f for (c, _), f in factors.items() if c in (copy, None)) for copy in copies or [None]]
        sigma = stats[name] if name in stats and name in contracted else None
        rules.append(Rule(f"^{re.escape(name)}$", _action(numbers, sigma), "tuned"))
    return rules


def _action(factors: list[float], stats) -> Action:
    def run(key: Any, info: ParamInfo) -> jax.Array:
        value = info.value
        if stats is not None:
            sigma = math.sqrt(stats.variance * (info.fan_in or 1))
            value = copies_apart(scaled_orthogonal(sigma), key, info, info.dtype)
        if len(factors) == 1:
            return value * jnp.asarray(factors[0], info.dtype)
        if not info.copies or info.shape[info.copies[0]] != len(factors):
            raise InputError(
                f"{info.path} of shape {info.shape}, a stack of {len(factors)} layers, without the model",
                "model= and inputs=, or a bias beside it",
                "each copy has its own scale",
                "give the model to reinitialize",
            )
        shape = [len(factors) if axis == info.copies[0] else 1 for axis in range(len(info.shape))]
        return value * jnp.asarray(np.asarray(factors).reshape(shape), info.dtype)

    text = f"{factors[0]:.4g}" if len(factors) == 1 else f"{min(factors):.4g}..{max(factors):.4g}"
    value = factors[0] if len(factors) == 1 and stats is None else None
    return Action(f"scale({text})" if stats is None else f"orthogonal, scale({text})", run, value)
