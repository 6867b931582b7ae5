"""A network at its real width: its exact tangent kernel, and its signals measured over seeds."""

from initjax.empirical.comparison import TrainingComparison as TrainingComparison
from initjax.empirical.comparison import compare_to_training as compare_to_training
from initjax.empirical.ensemble import KernelEstimate as KernelEstimate
from initjax.empirical.ensemble import monte_carlo_kernels as monte_carlo_kernels
from initjax.empirical.jacobian import measured_jacobian as measured_jacobian
from initjax.empirical.jacobian_results import MeasuredJacobian as MeasuredJacobian
from initjax.empirical.jacobian_results import MeasuredSpectrum as MeasuredSpectrum
from initjax.empirical.measurement import Measurement as Measurement
from initjax.empirical.measurement import measure as measure
from initjax.empirical.ntk import empirical_ntk as empirical_ntk
from initjax.empirical.operator import NTKOperator as NTKOperator
from initjax.empirical.operator import ntk_operator as ntk_operator
