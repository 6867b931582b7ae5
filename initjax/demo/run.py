"""The demonstration from end to end: predict four initializations, measure them, train them, and say who was right."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np

from initjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demonstration.

    Attributes
    ----------
    depth : weight layers.
    width : units of each hidden layer.
    draws : random networks of each initialization that are measured.
    seeds : random networks of each initialization that are trained, at each learning rate.
    ntk_images : training images in the tangent kernels.
    steps, batch, evaluations : optimizer steps, images in each, and how often the test accuracy is taken.
    learning_rates : all are tried; the middle one draws the curves.
    diagram_points : grid points along each axis of the phase diagram.
    seed : of every random draw.
    """

    depth: int = 32
    width: int = 128
    draws: int = 6
    seeds: int = 3
    ntk_images: int = 24
    steps: int = 300
    batch: int = 64
    evaluations: int = 15
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    diagram_points: int = 121
    seed: int = 0

    def __post_init__(self):
        least_sizes = (
            ("depth", 3),
            ("width", 2),
            ("draws", 2),
            ("seeds", 2),
            ("ntk_images", 2),
            ("steps", 1),
            ("batch", 1),
        )
        for name, least in least_sizes:
            if getattr(self, name) < least:
                raise InputError(
                    given=f"{name} = {getattr(self, name)}.",
                    accepted=f"{name} >= {least}.",
                    why="the demonstration compares first with last layers, and gives standard errors over seeds.",
                    remedy="leave it out for a size that takes a minute or two.",
                )
        if not 1 <= self.evaluations <= self.steps:
            raise InputError(
                given=f"evaluations = {self.evaluations} in {self.steps} steps.",
                accepted="1 <= evaluations <= steps.",
                why="the accuracy is taken after equal numbers of steps.",
                remedy="evaluations=1 takes it once, at the end.",
            )

    @property
    def learning_rate(self) -> float:
        """The rate whose curves are drawn, the middle one."""
        return sorted(self.learning_rates)[len(self.learning_rates) // 2]


def run(config: DemoConfig | None = None, progress: Callable[[str, int], Callable[[int], None]] | None = None):
    """Predict, measure, train, compare.

    Parameters
    ----------
    config : sizes; by default those of `make demo`.
    progress : `progress(title, total)` announces a long part and returns `advance(done)`; None for silence.

    Returns
    -------
    Report, with `.table()`, `.to_dict()` and `.verdict`.
    """
    import jax

    from initjax import empirical
    from initjax.demo import data, network, theory, training
    from initjax.demo.report import Line, Report, Series

    config = config or DemoConfig()
    progress = progress or (lambda title, total: lambda done: None)
    started = time.monotonic()
    digits = data.load()
    images = digits.x_train[: config.ntk_images]
    measure_key, train_key = jax.random.split(jax.random.key(config.seed))

    advance = progress("Predicting at infinite width", 5)
    setups = network.four_setups()
    background = theory.diagram(config.diagram_points, config.depth, (0.5, 2.75), (0.0, 0.3))
    advance(1)
    predicted = []
    for setup in setups:
        predicted.append(theory.predict(setup, config.depth, config.width, images))
        advance(1)

    advance = progress("Measuring at finite width", len(setups))
    model = setups[0].model(config.depth, config.width)
    ntk_fn = empirical.empirical_ntk(lambda params, x: model.apply({"params": params}, x))
    measured = []
    for setup in setups:
        measured.append(theory.measure(setup, config.depth, config.width, images, config.draws, measure_key, ntk_fn))
        advance(1)

    curves = training.train(
        [setup.model(config.depth, config.width) for setup in setups],
        digits,
        learning_rates=config.learning_rates,
        seeds=config.seeds,
        steps=config.steps,
        batch=config.batch,
        evaluations=config.evaluations,
        key=train_key,
        advance=progress("Training all alike", config.steps),
    )
    chosen = list(config.learning_rates).index(config.learning_rate)
    lines = tuple(
        Line(
            name=setup.name,
            sigma_w=setup.sigma_w,
            sigma_b=setup.sigma_b,
            predicted=theirs,
            measured=ours,
            curve=Series.over(accuracy[chosen]),
            best_accuracy=float(accuracy.mean(axis=1)[:, -1].max()),
        )
        for setup, theirs, ours, accuracy in zip(setups, predicted, measured, curves.accuracy, strict=True)
    )
    chance = float(np.bincount(digits.y_test).max() / len(digits.y_test))
    return Report(config, lines, background, curves.steps, chance, time.monotonic() - started)


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Progress bars on standard error, one for each long part."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<30}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:

        def start(title: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(title, total=total)
            return lambda done: bars.advance(task, done)

        yield start
