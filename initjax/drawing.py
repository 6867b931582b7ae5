"""An empty matplotlib figure that is drawn to files only: no window, no change to the user's pyplot state."""

from typing import Any

from initjax.errors import InputError


def blank_figure(width: float, height: float) -> Any:
    """A figure of `width` x `height` inches, or an error that says how to install matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            given="a request for a figure, but matplotlib is not installed.",
            accepted="an environment with matplotlib.",
            why="initjax draws with matplotlib, which it does not require otherwise.",
            remedy="pip install 'initjax[plots]'",
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
