"""What the eigenvalues of a kernel say: conditioning, effective rank, learning rates that do not diverge."""

from initjax.spectrum.conditioning import condition_number as condition_number
from initjax.spectrum.conditioning import effective_rank as effective_rank
from initjax.spectrum.conditioning import max_learning_rate as max_learning_rate
