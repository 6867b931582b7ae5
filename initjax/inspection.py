"""One report on a whole model: what theory predicts for its initialization beside what its random draws show.

It joins `kernel_fn` (infinite width), `measure` and `empirical_ntk` (the model's own width) and the spectrum of the
kernels, layer by layer, and adds nothing of its own but means over inputs. Where exact theory does not cover a layer,
the report says which and why, and the measured side stands alone.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from initjax.errors import InputError
from initjax.inspection_blocks import BlockReport, repeated_blocks
from initjax.inspection_width import with_widths

SIGNALS = 64  # inputs on which layers are predicted and measured; kernels take all
NTK_DRAWS = 4  # networks whose tangent kernels are measured, if as many are measured at all
PHASE_GAIN = 10.0


class Estimate(NamedTuple):
    """A mean over random networks and its standard error (nan for one network).

    Attributes
    ----------
    mean, standard_error : floats, in the unit of the quantity.
    """

    mean: float
    standard_error: float


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer that owns weights; all numbers are means over the inputs, None where a side has no answer.

    Attributes
    ----------
    name : path of the module.
    q, q_measured : second moment of a pre-activation.
    correlation, correlation_measured : of the pre-activations of two different inputs.
    chi : predicted factor by which a small perturbation's square grows from the layer before.
    gradient, gradient_measured : squared norm of the gradient of one output with respect to this layer's units.
    q_std : standard deviation over networks, at the model's own widths, of one input's second moment given the layers
        before (its kernel's diagonal entry): to first order in 1/width, exact for homogeneous activations without
        biases. None where the layer is not at the end of a chain of dense layers with i.i.d. weights.
    units, width_share : number of this layer's units that the next one sums over, and the part they have in the
        variance of q in the last layer that has a `q_std`: the bottleneck has the largest.
    """

    name: str
    q: float | None = None
    q_measured: Estimate | None = None
    correlation: float | None = None
    correlation_measured: Estimate | None = None
    chi: float | None = None
    gradient: float | None = None
    gradient_measured: Estimate | None = None
    q_std: float | None = None
    units: int | None = None
    width_share: float | None = None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What the initialization of one model does; made by `inspect`.

    Attributes
    ----------
    layers : one `LayerReport` for each layer, in order of computation, on the first 64 inputs; `name#2`, ... are
        further uses of a module and turns of a loop, of which theory reports the last.
    phase : "ordered", "critical" or "chaotic" as far as this depth can tell: the product of chi from the second layer
        to the last is below 1/10, between, or above 10. "unknown" where the theory gives no chi.
    gradient_ratio, gradient_ratio_measured : squared gradient at the first layer over that at the last; the measured
        one is the mean over networks of its decimal logarithm, so that its standard error means something.
    condition_number, condition_number_measured : of the tangent kernel on the inputs; measured as decimal logarithm.
    max_learning_rate, max_learning_rate_measured : largest stable learning rate of full-batch gradient descent on the
        mean squared error over the inputs, 1/(2n) sum (f - y)^2.
    blocks : one `BlockReport` for each block that the model repeats, with its chi and phase.
    wrong_fans : a line for each weight whose initializer has another fan than the sum it takes part in.
    refusal : why the exact theory does not cover the model; None where it does.
    particles : behind predictions that are estimates, see `kernel_fn`; 0 where they are exact or missing.
    notes : warnings of the two sides.
    inputs : number of inputs.
    networks, kernels : numbers of random networks behind the measurements, and behind those of tangent kernels.
    """

    layers: tuple[LayerReport, ...]
    phase: str
    gradient_ratio: float | None
    gradient_ratio_measured: Estimate | None
    condition_number: float | None
    condition_number_measured: Estimate | None
    max_learning_rate: float | None
    max_learning_rate_measured: Estimate | None
    refusal: str | None
    notes: tuple[str, ...]
    inputs: int
    networks: int
    kernels: int
    blocks: tuple[BlockReport, ...] = ()
    wrong_fans: tuple[str, ...] = ()
    particles: int = 0

    def __repr__(self) -> str:
        from initjax.report import summary

        return summary(self)

    @property
    def bottleneck(self) -> LayerReport | None:
        """The layer whose number of units adds most to the spread of the last layer's q; None if that is unknown."""
        known = [layer for layer in self.layers if layer.width_share is not None]
        return max(known, key=lambda layer: layer.width_share or 0.0, default=None)

    def to_dict(self) -> dict:
        """The report as dicts, lists, numbers, strings and None; infinities and nan stay floats."""
        return _plain(self)

    def table(self) -> Any:
        """The report for a terminal, as a rich renderable (`rich.print(report.table())`)."""
        from initjax.report import table

        return table(self)

    def plot(self) -> Any:
        """Draw q, correlation and gradients over the layers: theory as lines, measurements as points.

        Returns
        -------
        A matplotlib figure with three axes. Needs matplotlib (extra "plots").
        """
        from initjax.report import draw

        return draw(self)

    def to_html(self, path: Any) -> Path:
        """Write the table and the figure as one self-contained HTML file; returns its path. Needs matplotlib."""
        from initjax.report import write_html

        return write_html(self, Path(path))

    def _repr_html_(self) -> str:
        from initjax.report import table_as_html

        return table_as_html(self)


def inspect(
    model: Any,
    inputs: Any,
    *,
    key: Any,
    depth_report: bool = True,
    kernels: bool = True,
    seeds: int = 8,
    apply_kwargs: dict | None = None,
    rngs: Any = None,
    on_unsupported: str = "raise",
    particles: int = 4096,
) -> Inspection:
    r"""Report what the initialization of a model does: predicted at infinite width, measured at its own.

    Parameters
    ----------
    model : a linen module, an nnx module, a factory `lambda rngs: Model(rngs=rngs)`, or a pair `(init_fn, apply_fn)`.
    inputs : batch of n examples, or a tuple or dict of call arguments that are batches; n of 16 to 64 tells enough
        about layers; the condition number grows with n, up to the batch of the training itself.
    key : random key of the measured networks.
    depth_report : measure second moments, correlations and gradients of every layer.
    kernels : measure tangent kernels too (of at most 4 networks), in float64.
    seeds : number of random networks to measure.
    apply_kwargs, rngs : as in `kernel_fn`.
    on_unsupported : "raise": no prediction where the exact theory ends. "monte_carlo": an estimated one there.
    particles : of that estimate, see `kernel_fn`.

    Returns
    -------
    Inspection, with `.table()`, `.to_dict()`, `.plot()` and `.to_html(path)`.

    Raises
    ------
    InputError : a class instead of an instance, inputs that do not fit, `seeds` below 1. A layer that exact theory
        does not cover raises nothing: it is told in the report, whose measured side still stands.

    Accuracy
    --------
    Predictions as `kernel_fn`; they hold at infinite width, and `q_std` says how far one network strays from it.
    Measurements have their standard error beside them.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> import initjax as ij
    >>> he = nn.initializers.he_normal()
    >>> model = nn.Sequential([nn.Dense(64, kernel_init=he), nn.relu, nn.Dense(64, kernel_init=he)])
    >>> x = jax.random.normal(jax.random.key(0), (4, 16))
    >>> report = ij.inspect(model, x, key=jax.random.key(1), kernels=False)
    >>> [layer.name for layer in report.layers], round(report.layers[1].chi, 6), report.phase
    (['layers_0', 'layers_2'], 1.0, 'critical')
    >>> measured = report.layers[1].q_measured
    >>> bool(abs(measured.mean - report.layers[1].q) < 4 * measured.standard_error)
    True

    References
    ----------
    Schoenholz et al. 2017 (arXiv:1611.01232) for q, c, chi and gradients; Xiao, Pennington, Schoenholz 2020
    (arXiv:1912.13053) for the condition number.
    """
    from initjax import empirical
    from initjax.infinite import kernel_fn
    from initjax.reinit.audit import audit_fans
    from initjax.trace.flax import as_functional

    if isinstance(seeds, bool) or not isinstance(seeds, int | np.integer) or seeds < 1:
        raise InputError(
            f"seeds = {seeds!r}.", "an integer >= 1.", "it is the number of random networks.", "8 give a first idea."
        )
    options = dict(apply_kwargs=apply_kwargs, rngs=rngs)
    functional = as_functional(model, inputs, **options)
    n = len(jax.tree.leaves(inputs)[0])
    notes: list[str] = []
    chosen = dict(on_unsupported=on_unsupported, particles=particles)
    few = inputs if n <= SIGNALS else jax.tree.map(lambda leaf: leaf[:SIGNALS], inputs)

    def theory():
        kernel = kernel_fn(model, inputs, **chosen, **options)
        found = kernel(few, get=("ntk", "layers"))
        return kernel, found, found.ntk if n <= SIGNALS else kernel(inputs, get="ntk").ntk

    told, refusal = _try(theory, "")
    function, predicted, ntk = told or (None, None, None)
    signal_key, kernel_key = jax.random.split(key)
    measured, found = None, []
    if depth_report:
        measure = lambda: empirical.measure(model, few, key=signal_key, seeds=seeds, **options)  # noqa: E731
        measured, missing = _try(measure, "layers are not measured: ")
        notes += [missing] if missing else []
    if kernels:
        draws = min(seeds, NTK_DRAWS)
        found, missing = _try(
            lambda: measured_kernels(functional, inputs, kernel_key, draws), "tangent kernels are not measured: "
        )
        notes += [missing] if missing else []
    fans, _ = _try(lambda: audit_fans(model, inputs, **options), "")
    layers = _join(predicted, measured, min(n, SIGNALS))
    if predicted is not None and predicted.exact:
        known = layers
        joined, missing = _try(lambda: with_widths(known, function, predicted, few), "no spread of q: ")
        notes += [str(missing)] if joined is None else joined[1]
        layers = known if joined is None else joined[0]
    gradient = _ratio([layer.gradient for layer in layers])
    ratios = None
    if measured is not None:
        samples = measured.gradient_samples.mean(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = _over(np.log10(samples[:, 0]) - np.log10(samples[:, -1]))
    notes += list(predicted.notes) if predicted is not None else []
    if measured is not None and measured.not_measured:
        notes.append(f"not measured, since no product with data was found: {', '.join(measured.not_measured)}")
    return Inspection(
        layers=layers,
        phase=_phase([layer.chi for layer in layers[1:]]) if predicted is not None else "unknown",
        gradient_ratio=gradient,
        gradient_ratio_measured=ratios,
        **_spectra(None if ntk is None else np.asarray(ntk), found or [], n),
        refusal=refusal,
        notes=tuple(notes),
        inputs=n,
        networks=0 if measured is None else measured.q_samples.shape[0],
        kernels=len(found or []),
        blocks=repeated_blocks(layers),
        wrong_fans=tuple(f"{row.name}: {row.fix}" for row in fans.wrong) if fans is not None else (),
        particles=0 if predicted is None else predicted.particles,
    )


def _try(compute: Any, what: str) -> tuple[Any, str | None]:
    """The result and None, or None and why there is none: one side of the report never takes the other with it."""
    try:
        return compute(), None
    except InputError as error:
        return None, f"{what}{error}"
    except Exception as error:  # the model runs, so what fails is ours or JAX's; it is told, not hidden
        return None, f"{what}{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def measured_kernels(functional: Any, inputs: Any, key: Any, draws: int) -> list[np.ndarray]:
    """Tangent kernels of random networks in float64: in float32 a condition number above 1e6 drowns in rounding."""
    from initjax.empirical import empirical_ntk
    from initjax.trace.jaxpr import float64

    ntk_fn = empirical_ntk(functional.apply)
    inputs = jax.tree.map(jax.numpy.asarray, inputs)  # NumPy's int64 tokens are int32 outside of float64(), and stay so
    kernels = []
    for one in jax.random.split(key, 1 if functional.values is not None else draws):
        params = functional.init(one)
        try:
            with float64():
                kernel = ntk_fn(_wide(params), _wide(inputs))
        except (TypeError, InputError):  # a model that insists on its own precision, as in the carry of a scan
            kernel = ntk_fn(params, inputs)
        kernels.append(np.asarray(kernel, np.float64))
    return kernels


def _wide(tree: Any) -> Any:
    """Floating leaves as float64."""
    leaves, structure = jax.tree.flatten(tree)
    wide = [np.asarray(leaf, np.float64) if np.asarray(leaf).dtype.kind not in "iub" else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, wide)


def _spectra(predicted: np.ndarray | None, measured: list[np.ndarray], n: int) -> dict:
    from initjax.spectrum import condition_number, max_learning_rate

    answer: dict[str, Any] = dict.fromkeys(
        ("condition_number", "condition_number_measured", "max_learning_rate", "max_learning_rate_measured")
    )
    if predicted is not None:
        answer["condition_number"] = float(condition_number(predicted))
        answer["max_learning_rate"] = float(max_learning_rate(predicted, n))
    if measured:
        answer["condition_number_measured"] = _over(np.array([np.log10(float(condition_number(k))) for k in measured]))
        answer["max_learning_rate_measured"] = _over(np.array([max_learning_rate(k, n) for k in measured]))
    return answer


def _join(predicted: Any, measured: Any, n: int) -> tuple[LayerReport, ...]:
    """Both sides by layer name. Of a module used several times (`name`, `name#2`, ...) theory reports the last use."""
    off = ~np.eye(n, dtype=bool)
    rows: dict[str, dict] = {}
    last_use: dict[str, str] = {}
    if measured is not None:
        q, gradient = (samples.mean(-1) for samples in (measured.q_samples, measured.gradient_samples))
        for i, name in enumerate(measured.layers):
            last_use[name.partition("#")[0]] = name
            rows[name] = dict(
                q_measured=_over(q[:, i]),
                correlation_measured=_correlation(measured, i, off) if n > 1 else None,
                gradient_measured=_over(gradient[:, i]),
            )
    layers: tuple[Any, ...] = predicted.layers if predicted is not None else ()
    for layer in layers:
        name = str(layer.name)
        rows.setdefault(last_use.get(name, name), {}).update(
            q=float(np.mean(layer.q)),
            correlation=float(np.mean(np.asarray(layer.correlation)[off])) if n > 1 else None,
            chi=_number(layer.chi),
            gradient=_number(layer.gradient),
        )
    return tuple(LayerReport(name, **numbers) for name, numbers in rows.items())


def _correlation(measured: Any, layer: int, off: np.ndarray) -> Estimate:
    """Mean over pairs of inputs; their errors belong to the same networks, so they add up rather than average out."""
    return Estimate(
        float(measured.correlation[layer][off].mean()), float(measured.correlation_error[layer][off].mean())
    )


def _number(values: Any) -> float | None:
    mean = float(np.mean(values))
    return None if math.isnan(mean) else mean


def _over(samples: np.ndarray) -> Estimate:
    samples = np.asarray(samples, np.float64)
    error = (
        samples.std(ddof=1) / math.sqrt(len(samples)) if len(samples) > 1 and np.isfinite(samples).all() else math.nan
    )
    return Estimate(float(samples.mean()), float(error))


def _ratio(gradients: list[float | None]) -> float | None:
    known = [value for value in gradients if value is not None]
    return known[0] / known[-1] if len(known) > 1 and known[-1] > 0 else None


def _phase(chi: list[float | None]) -> str:
    known = [value for value in chi if value is not None]
    if not known:
        return "unknown"
    gain = math.prod(known)
    return "ordered" if gain < 1 / PHASE_GAIN else "chaotic" if gain > PHASE_GAIN else "critical"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Estimate):
        return value._asdict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
