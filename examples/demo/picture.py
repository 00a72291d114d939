"""One picture of a run: accuracy and both epsilons over the rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INK, SOFT, FLEET, PLAIN, ALONE, SECOND = "#222222", "#8a8a8a", "#0b6e4f", "#2f4b7c", "#b0502d", "#7a5195"


@dataclass(frozen=True)
class Point:
    """After one round.  accuracy: held out.  masked: what the masked metrics said of the training batch, noisy.

    readers, coordinator: epsilon so far, against each.
    """

    round: int
    accuracy: float
    masked: float
    readers: float
    coordinator: float


def draw(
    path: Path,
    points: Sequence[Point],
    *,
    title: str,
    plain: float,
    alone: Sequence[float],
    delta: float,
    target: float,
) -> None:
    """Write a PNG.  plain: accuracy without privacy.  alone: each device's by itself.  target: to be reached."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": SOFT}
    rounds = [point.round for point in points]
    with mpl.rc_context(style):  # type: ignore[arg-type]
        figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=[3, 2])
        upper.plot(
            rounds, [p.masked for p in points], ".", color=SOFT, markersize=5, label="training, by masked metrics"
        )
        upper.plot(rounds, [p.accuracy for p in points], color=FLEET, linewidth=2, label="fleet, held out")
        upper.axhline(plain, color=PLAIN, linestyle="--", linewidth=1.2, label=f"without privacy: {plain:.1%}")
        best, middle = max(alone), sorted(alone)[len(alone) // 2]
        upper.axhspan(min(alone), best, color=ALONE, alpha=0.15, linewidth=0)
        upper.axhline(middle, color=ALONE, linewidth=1.2, label=f"each device alone: {middle:.1%} (band: all)")
        upper.axhline(target, color=INK, linestyle=":", linewidth=1, label=f"to be reached: {target:.0%}")
        upper.set_ylim(0, 1)
        upper.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        upper.set_ylabel("accuracy")
        upper.set_title(title, loc="left", color=INK)
        upper.legend(loc="lower right", frameon=False)
        lower.plot(rounds, [p.readers for p in points], color=FLEET, linewidth=2, label="against readers of the models")
        lower.plot(
            rounds, [p.coordinator for p in points], color=SECOND, linewidth=2, linestyle="--",
            label="against the coordinator, who sees who sent",
        )  # fmt: skip
        lower.set_ylabel(f"epsilon at delta = {delta:.0e}")
        lower.set_xlabel("round")
        lower.set_ylim(bottom=0)
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        lower.legend(loc="lower right", frameon=False)
        figure.align_ylabels()
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)
