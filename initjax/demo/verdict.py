"""One sentence on whether the prediction held, computed from the numbers and nothing else.

The prediction is fixed before training: a network of `depth` layers is trainable if depth <= 6 xi, where xi is the
shorter of the depth scales over which gradients change and inputs are forgotten (Schoenholz, Gilmer, Ganguli,
Sohl-Dickstein 2017, arXiv:1611.01232, section 5). Training has succeeded where the test accuracy passes the middle
between guessing and perfection.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

DEPTH_SCALES = 6.0


class Estimate(NamedTuple):
    """A mean over seeds and its standard error."""

    mean: float
    standard_error: float


class Outcome(NamedTuple):
    """What the verdict looks at, for one initialization.

    Attributes
    ----------
    name : of the initialization.
    trainable : what theory said before training.
    accuracy : test accuracy after training, a fraction, over seeds.
    best_accuracy : the largest mean over all learning rates tried.
    gradient_ratio : predicted gradient second moment at the first layer over that at the last.
    measured_log10_gradient_ratio : its decimal logarithm at finite width, over seeds.
    condition_number : predicted condition number of the tangent kernel.
    measured_log10_condition_number : its decimal logarithm at finite width, over seeds.
    """

    name: str
    trainable: bool
    accuracy: Estimate
    best_accuracy: float
    gradient_ratio: float
    measured_log10_gradient_ratio: Estimate
    condition_number: float
    measured_log10_condition_number: Estimate


def is_trainable(depth: int, xi_grad: float, xi_c: float) -> bool:
    """Whether a network this deep should learn: depth <= 6 min(|xi_grad|, xi_c).

    Examples
    --------
    >>> is_trainable(40, xi_grad=float("inf"), xi_c=float("inf")), is_trainable(40, xi_grad=-1.6, xi_c=2.0)
    (True, False)
    """
    return depth <= DEPTH_SCALES * min(abs(xi_grad), abs(xi_c))


def has_trained(accuracy: float, chance: float) -> bool:
    """Whether the accuracy lies past the middle between guessing and perfection."""
    return accuracy > (1 + chance) / 2


def verdict(outcomes: Sequence[Outcome], *, depth: int, steps: int, chance: float) -> str:
    """Say in one sentence what was predicted, what happened, and where the two disagree.

    Parameters
    ----------
    outcomes : one for each initialization.
    depth : weight layers.
    steps : optimizer steps.
    chance : accuracy of guessing.

    Returns
    -------
    One sentence.
    """
    wrong = [one for one in outcomes if one.trainable != has_trained(one.accuracy.mean, chance)]
    predicted = (
        f"Before training, depth {depth} against {DEPTH_SCALES:g} depth scales said that "
        f"{_names(outcomes, True)} would learn and {_names(outcomes, False)} would not"
    )
    reached = ", ".join(f"{one.name} {_percent(one.accuracy)}" for one in outcomes)
    happened = f"after {steps} steps the test accuracy is {reached} (guessing: {100 * chance:.0f} %)"
    told = "so prediction and training agree on "
    if wrong:
        names = " and ".join(one.name for one in wrong)
        told += f"{len(outcomes) - len(wrong)} of {len(outcomes)} and DISAGREE on {names}"
    else:
        told += f"all {len(outcomes)}"
    told += _at_other_rates(outcomes, chance)
    return f"{predicted}; {happened}, {told}; {_gradients(outcomes)}; {_kernels(outcomes)}."


def _names(outcomes: Sequence[Outcome], trainable: bool) -> str:
    return " and ".join(one.name for one in outcomes if one.trainable == trainable) or "none of them"


def _percent(accuracy: Estimate) -> str:
    error = "" if math.isnan(accuracy.standard_error) else f" ± {100 * accuracy.standard_error:.1f}"
    return f"{100 * accuracy.mean:.1f}{error} %"


def _at_other_rates(outcomes: Sequence[Outcome], chance: float) -> str:
    """Name those whose success depends on the learning rate: a failure that a better rate repairs proves little."""
    rescued = [
        one.name
        for one in outcomes
        if has_trained(one.best_accuracy, chance) and not has_trained(one.accuracy.mean, chance)
    ]
    return f" (though {' and '.join(rescued)} did learn at another learning rate)" if rescued else ""


def _gradients(outcomes: Sequence[Outcome]) -> str:
    """How far the measured gradient ratios lie from the predicted ones, as the worst factor."""
    predicted = [one.gradient_ratio for one in outcomes]
    spread = max(predicted) / min(predicted) if min(predicted) > 0 else math.inf
    gaps = {one.name: _gap(one.gradient_ratio, one.measured_log10_gradient_ratio) for one in outcomes}
    return f"first-to-last gradient ratios span a factor {spread:.0e} and were predicted {_worst(gaps)}"


def _kernels(outcomes: Sequence[Outcome]) -> str:
    """The same for condition numbers, and whether they come in the predicted order."""
    gaps = {one.name: _gap(one.condition_number, one.measured_log10_condition_number) for one in outcomes}
    predicted = sorted(outcomes, key=lambda one: one.condition_number)
    measured = sorted(outcomes, key=lambda one: one.measured_log10_condition_number.mean)
    order = "come in the predicted order" if predicted == measured else "do NOT come in the predicted order"
    return f"NTK condition numbers {order}, {_worst(gaps)} of their values at infinite width"


def _gap(predicted: float, measured: Estimate) -> float:
    """Distance in decades; infinite where one side is zero or infinite."""
    if not 0 < predicted < math.inf:
        return 0.0 if measured.mean == math.inf == predicted else math.inf
    return abs(measured.mean - math.log10(predicted))


def _worst(gaps: dict[str, float]) -> str:
    name = max(gaps, key=lambda key: gaps[key])
    return f"within a factor {10 ** gaps[name]:.2g} (worst: {name})"
