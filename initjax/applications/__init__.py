"""What initialization theory says about the uses of networks: thin answers on the pillars, one module a question.

`symmetry`      which units start as copies of each other, and how long near copies take to part
`pinn`          how large the residual of a differential equation and its gradients are, and its kernels
`signal`        what a deep linear network, and Xavier initialization, does to signals and gradients

Each module is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initjax.applications import pinn as pinn
    from initjax.applications import signal as signal
    from initjax.applications import symmetry as symmetry

_MODULES = (
    "pinn",
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
