"""The picture of a phase diagram. The only file of this room that knows matplotlib, and only when called."""

import numpy as np

from initjax.errors import InputError

PHASE_COLOURS = {"ordered": "#9ecae1", "critical": "#f7f7f7", "chaotic": "#fdae6b", "unbounded": "#bdbdbd"}


def draw_diagram(diagram, ax=None):
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if diagram.q.ndim != 2 or min(diagram.q.shape) < 2:
        raise InputError(
            f"a phase diagram of shape {diagram.q.shape}.",
            "a two-dimensional grid with at least two values along each axis.",
            "regions and contours need a plane.",
            "ij.phase_diagram(phi, np.linspace(0.5, 3, 200), np.linspace(0, 1, 200)).plot().",
        )
    ax = ax or plt.subplots(figsize=(6, 4.5), layout="constrained")[1]
    names = list(PHASE_COLOURS)
    code = np.searchsorted(np.sort(names), diagram.phase)
    order = np.sort(names)
    ax.pcolormesh(
        diagram.sigma_w,
        diagram.sigma_b,
        code,
        cmap=ListedColormap([PHASE_COLOURS[n] for n in order]),
        vmin=-0.5,
        vmax=len(order) - 0.5,
        shading="nearest",
        rasterized=True,
    )
    scale = np.where(np.isfinite(diagram.xi_c), diagram.xi_c, np.nan)
    levels = [2.0, 5.0, 10.0, 30.0, 100.0]
    inside = [v for v in levels if np.nanmin(scale) < v < np.nanmax(scale)] if np.isfinite(scale).any() else []
    if inside:
        lines = ax.contour(
            diagram.sigma_w, diagram.sigma_b, scale, levels=inside, colors="0.35", linewidths=0.7, linestyles="dotted"
        )
        ax.clabel(lines, fmt=lambda v: f"{v:g}", fontsize=7)
    line = diagram.critical_line
    steady = line[:, 2] == 1
    alone = "o" if np.count_nonzero(np.isfinite(line[:, 0])) == 1 else None  # relu: one critical point, no line
    ax.plot(np.where(steady, line[:, 0], np.nan), line[:, 1], color="black", lw=2, marker=alone, clip_on=alone is None)
    ax.plot(np.where(~steady, line[:, 0], np.nan), line[:, 1], color="black", lw=2, ls="--")
    ax.set(
        xlabel=r"weight standard deviation $\sigma_w$ (Var $W=\sigma_w^2$/fan-in)",
        ylabel=r"bias standard deviation $\sigma_b$",
        xlim=(diagram.sigma_w.min(), diagram.sigma_w.max()),
        ylim=(diagram.sigma_b.min(), diagram.sigma_b.max()),
    )
    handles: list = [
        Patch(color=PHASE_COLOURS[n], label=n) for n in names if n != "critical" and (diagram.phase == n).any()
    ]
    label = r"critical point $\chi_1=1$" if alone else r"critical line $\chi_1=1$"
    handles.append(Line2D([], [], color="black", lw=0 if alone else 2, marker=alone, label=label))
    if (~steady & np.isfinite(line[:, 0])).any():
        handles.append(Line2D([], [], color="black", lw=2, ls="--", label="critical, unstable"))
    if inside:
        handles.append(Line2D([], [], color="0.35", lw=0.7, ls="dotted", label=r"depth scale $\xi_c$ (layers)"))
    ax.legend(handles=handles, loc="upper left", fontsize=8, framealpha=0.9)
    return ax
