"""initjax: what a neural network's initialization will do, computed before training.

Names are resolved on first use, so that `initjax --help` starts without importing JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initjax import applications as applications
    from initjax import gaussian as gaussian
    from initjax import initializers as initializers
    from initjax import layers as layers
    from initjax import rules as rules
    from initjax import shaping as shaping
    from initjax.empirical import MeasuredJacobian as MeasuredJacobian
    from initjax.empirical import MeasuredSpectrum as MeasuredSpectrum
    from initjax.empirical import compare_to_training as compare_to_training
    from initjax.empirical import empirical_ntk as empirical_ntk
    from initjax.empirical import measure as measure
    from initjax.empirical import measured_jacobian as measured_jacobian
    from initjax.empirical import monte_carlo_kernels as monte_carlo_kernels
    from initjax.empirical import ntk_operator as ntk_operator
    from initjax.errors import InputError as InputError
    from initjax.errors import NoCriticalPointError as NoCriticalPointError
    from initjax.errors import NotElementwiseError as NotElementwiseError
    from initjax.errors import PartialKernelError as PartialKernelError
    from initjax.errors import QuadratureError as QuadratureError
    from initjax.errors import UnattainableTargetError as UnattainableTargetError
    from initjax.errors import UnnormalisedInputsWarning as UnnormalisedInputsWarning
    from initjax.errors import UnreliableExpansionWarning as UnreliableExpansionWarning
    from initjax.errors import UnstableCriticalPointWarning as UnstableCriticalPointWarning
    from initjax.errors import UnsupportedLayerError as UnsupportedLayerError
    from initjax.forecast import Claim as Claim
    from initjax.forecast import Trainability as Trainability
    from initjax.forecast import trainability as trainability
    from initjax.gaussian import Activation as Activation
    from initjax.gaussian import gain as gain
    from initjax.infinite import Kernel as Kernel
    from initjax.infinite import kernel_fn as kernel_fn
    from initjax.inspection import Inspection as Inspection
    from initjax.inspection import inspect as inspect
    from initjax.meanfield import CriticalPoint as CriticalPoint
    from initjax.meanfield import FiniteWidth as FiniteWidth
    from initjax.meanfield import FixedPoint as FixedPoint
    from initjax.meanfield import Inputs as Inputs
    from initjax.meanfield import JacobianSpectrum as JacobianSpectrum
    from initjax.meanfield import PhaseDiagram as PhaseDiagram
    from initjax.meanfield import Trajectory as Trajectory
    from initjax.meanfield import Universality as Universality
    from initjax.meanfield import VarianceRoots as VarianceRoots
    from initjax.meanfield import critical as critical
    from initjax.meanfield import critical_points as critical_points
    from initjax.meanfield import finite_width as finite_width
    from initjax.meanfield import fixed_point as fixed_point
    from initjax.meanfield import inputs as inputs
    from initjax.meanfield import jacobian_spectrum as jacobian_spectrum
    from initjax.meanfield import phase_diagram as phase_diagram
    from initjax.meanfield import propagate as propagate
    from initjax.meanfield import universality as universality
    from initjax.meanfield import variance_roots as variance_roots
    from initjax.reinit import FanReport as FanReport
    from initjax.reinit import History as History
    from initjax.reinit import Plan as Plan
    from initjax.reinit import Tuned as Tuned
    from initjax.reinit import apjn as apjn
    from initjax.reinit import audit_fans as audit_fans
    from initjax.reinit import gradinit as gradinit
    from initjax.reinit import labels as labels
    from initjax.reinit import lsuv as lsuv
    from initjax.reinit import metainit as metainit
    from initjax.reinit import plan as plan
    from initjax.reinit import reinitialize as reinitialize
    from initjax.reinit import tune as tune
    from initjax.reinit import weight_norm_init as weight_norm_init
    from initjax.spectrum import condition_number as condition_number
    from initjax.spectrum import effective_rank as effective_rank
    from initjax.spectrum import extreme_eigenvalues as extreme_eigenvalues
    from initjax.spectrum import kernel_alignment as kernel_alignment
    from initjax.spectrum import kernel_regression as kernel_regression
    from initjax.spectrum import log_determinant as log_determinant
    from initjax.spectrum import max_learning_rate as max_learning_rate
    from initjax.spectrum import spectral_density as spectral_density
    from initjax.spectrum import time_to_fit as time_to_fit
    from initjax.spectrum import trajectory as trajectory

# public name -> the module that holds it; a module's own name stands for the module itself
_HOME = {
    "applications": "applications",
    "gaussian": "gaussian",
    "initializers": "initializers",
    "layers": "layers",
    "shaping": "shaping",
    "empirical_ntk": "empirical",
    "MeasuredJacobian": "empirical",
    "MeasuredSpectrum": "empirical",
    "measure": "empirical",
    "measured_jacobian": "empirical",
    "ntk_operator": "empirical",
    "InputError": "errors",
    "NoCriticalPointError": "errors",
    "NotElementwiseError": "errors",
    "PartialKernelError": "errors",
    "QuadratureError": "errors",
    "UnattainableTargetError": "errors",
    "UnnormalisedInputsWarning": "errors",
    "UnreliableExpansionWarning": "errors",
    "UnstableCriticalPointWarning": "errors",
    "UnsupportedLayerError": "errors",
    "Claim": "forecast",
    "Trainability": "forecast",
    "trainability": "forecast",
    "Activation": "gaussian",
    "gain": "gaussian",
    "Kernel": "infinite",
    "kernel_fn": "infinite",
    "Inspection": "inspection",
    "inspect": "inspection",
    "CriticalPoint": "meanfield",
    "FiniteWidth": "meanfield",
    "FixedPoint": "meanfield",
    "Inputs": "meanfield",
    "JacobianSpectrum": "meanfield",
    "PhaseDiagram": "meanfield",
    "Trajectory": "meanfield",
    "VarianceRoots": "meanfield",
    "Universality": "meanfield",
    "critical": "meanfield",
    "critical_points": "meanfield",
    "finite_width": "meanfield",
    "fixed_point": "meanfield",
    "inputs": "meanfield",
    "jacobian_spectrum": "meanfield",
    "phase_diagram": "meanfield",
    "propagate": "meanfield",
    "universality": "meanfield",
    "variance_roots": "meanfield",
    "FanReport": "reinit",
    "History": "reinit",
    "Tuned": "reinit",
    "apjn": "reinit",
    "gradinit": "reinit",
    "lsuv": "reinit",
    "metainit": "reinit",
    "tune": "reinit",
    "weight_norm_init": "reinit",
    "Plan": "reinit",
    "audit_fans": "reinit",
    "labels": "reinit",
    "plan": "reinit",
    "reinitialize": "reinit",
    "rules": "rules",
    "condition_number": "spectrum",
    "effective_rank": "spectrum",
    "extreme_eigenvalues": "spectrum",
    "log_determinant": "spectrum",
    "max_learning_rate": "spectrum",
    "spectral_density": "spectrum",
    "kernel_alignment": "spectrum",
    "kernel_regression": "spectrum",
    "time_to_fit": "spectrum",
    "trajectory": "spectrum",
    "monte_carlo_kernels": "empirical",
    "compare_to_training": "empirical",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'initjax' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = importlib.import_module(f"initjax.{_HOME[name]}")
    value = home if name == _HOME[name] and name not in vars(home) else getattr(home, name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
