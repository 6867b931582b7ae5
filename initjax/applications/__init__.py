"""What initialization theory says about the uses of networks: thin answers on the pillars, one module a question.

`adversarial`   how sensitive outputs are to inputs, and what a scale of the weights does to that
`conditioning`  condition numbers of NNGP and NTK against depth, with their laws in the three phases
`dynamics`      whether another initialization changes what is learned, or only how fast
`heads`         scale, first loss and trunk gradient of heads for transfer and for many tasks
`input_scale`   the input scale at which an update becomes catastrophic, and the layer that fails first
`meta`          which weight scale adapts fastest, learned through inner steps
`pinn`          how large the residual of a differential equation and its gradients are, and its kernels
`recurrent`     critical recurrent weights with an input, and how long a cell remembers
`residual`      growth by skip connections, zero branches and what they leave without gradient
`rl`            optimistic values at initialization, and how fast the optimism leaks away
`signal`        what a deep linear network, and Xavier initialization, does to signals and gradients
`symmetry`      which units start as copies of each other, and how long near copies take to part

Each module is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initjax.applications import adversarial as adversarial
    from initjax.applications import conditioning as conditioning
    from initjax.applications import dynamics as dynamics
    from initjax.applications import heads as heads
    from initjax.applications import input_scale as input_scale
    from initjax.applications import meta as meta
    from initjax.applications import pinn as pinn
    from initjax.applications import recurrent as recurrent
    from initjax.applications import residual as residual
    from initjax.applications import rl as rl
    from initjax.applications import signal as signal
    from initjax.applications import symmetry as symmetry

_MODULES = (
    "adversarial",
    "conditioning",
    "dynamics",
    "heads",
    "input_scale",
    "meta",
    "pinn",
    "recurrent",
    "residual",
    "rl",
    "signal",
    "symmetry",
)

__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'initjax.applications' has no attribute {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f"initjax.applications.{name}")


def __dir__():
    return __all__
