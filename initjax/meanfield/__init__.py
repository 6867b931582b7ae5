"""Mean-field theory of depth: variance and correlation maps, phases, criticality."""

from initjax.meanfield.criticality import critical as critical
from initjax.meanfield.criticality import critical_points as critical_points
from initjax.meanfield.dataset import Inputs as Inputs
from initjax.meanfield.dataset import inputs as inputs
from initjax.meanfield.diagram import PhaseDiagram as PhaseDiagram
from initjax.meanfield.diagram import phase_diagram as phase_diagram
from initjax.meanfield.finite import FiniteWidth as FiniteWidth
from initjax.meanfield.finite import finite_width as finite_width
from initjax.meanfield.fixed import fixed_point as fixed_point
from initjax.meanfield.isometry import JacobianSpectrum as JacobianSpectrum
from initjax.meanfield.isometry import jacobian_spectrum as jacobian_spectrum
from initjax.meanfield.results import CriticalPoint as CriticalPoint
from initjax.meanfield.results import FixedPoint as FixedPoint
from initjax.meanfield.results import Trajectory as Trajectory
from initjax.meanfield.roots import VarianceRoots as VarianceRoots
from initjax.meanfield.roots import variance_roots as variance_roots
from initjax.meanfield.trajectory import propagate as propagate
from initjax.meanfield.universality import Universality as Universality
from initjax.meanfield.universality import universality as universality
