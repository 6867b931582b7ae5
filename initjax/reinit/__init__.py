"""From diagnosis to cure: the true fans of a model, rules that re-initialize it from outside, and tuning."""

from initjax.reinit.audit import FanReport as FanReport
from initjax.reinit.audit import audit_fans as audit_fans
from initjax.reinit.data import apjn as apjn
from initjax.reinit.data import lsuv as lsuv
from initjax.reinit.data import weight_norm_init as weight_norm_init
from initjax.reinit.engine import Plan as Plan
from initjax.reinit.engine import labels as labels
from initjax.reinit.engine import plan as plan
from initjax.reinit.engine import reinitialize as reinitialize
from initjax.reinit.learned import History as History
from initjax.reinit.learned import gradinit as gradinit
from initjax.reinit.learned import metainit as metainit
from initjax.reinit.tune import Tuned as Tuned
from initjax.reinit.tune import tune as tune
