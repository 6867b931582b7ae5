"""What the eigenvalues of a kernel say: conditioning, effective rank, learning rates that do not diverge."""

from initjax.spectrum.conditioning import condition_number as condition_number
from initjax.spectrum.conditioning import extreme_eigenvalues as extreme_eigenvalues
from initjax.spectrum.conditioning import max_learning_rate as max_learning_rate
from initjax.spectrum.density import effective_rank as effective_rank
from initjax.spectrum.density import log_determinant as log_determinant
from initjax.spectrum.density import spectral_density as spectral_density
from initjax.spectrum.regression import KernelRegression as KernelRegression
from initjax.spectrum.regression import kernel_alignment as kernel_alignment
from initjax.spectrum.regression import kernel_regression as kernel_regression
from initjax.spectrum.results import ExtremeEigenvalues as ExtremeEigenvalues
from initjax.spectrum.results import SpectralDensity as SpectralDensity
from initjax.spectrum.results import SpectralEstimate as SpectralEstimate
from initjax.spectrum.training import LinearTrajectory as LinearTrajectory
from initjax.spectrum.training import time_to_fit as time_to_fit
from initjax.spectrum.training import trajectory as trajectory
