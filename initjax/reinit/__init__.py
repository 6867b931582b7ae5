"""From diagnosis to cure: the true fans of a model, rules that re-initialize it from outside, and tuning."""

from initjax.reinit.audit import FanReport as FanReport
from initjax.reinit.audit import audit_fans as audit_fans
from initjax.reinit.engine import Plan as Plan
from initjax.reinit.engine import labels as labels
from initjax.reinit.engine import plan as plan
from initjax.reinit.engine import reinitialize as reinitialize
