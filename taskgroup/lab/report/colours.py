"""The colours that all figures share, in the browser and in PNG files."""

from __future__ import annotations

__all__ = ["BLANK", "HARMS", "INK", "RUNS", "SECTIONS", "SERVES", "colour_of_run"]

INK = "#24292f"
#: Of matrices: what lowers a loss, what raises it (numbers in ink are legible on both).
SERVES, HARMS = "#4393c3", "#d6604d"
#: Cells without a value; white is the value 0.
BLANK = "#e4e4e4"
#: Lines of runs; from the eleventh run on they repeat.
RUNS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
#: The timed sections of a batch, the rest of it, and the whole batch where no section was timed.
SECTIONS = {
    "forward": "#4393c3",
    "loss": "#92c5de",
    "backward": "#d6604d",
    "optimizer": "#f4a582",
    "other": "#bdbdbd",
    "not divided": "#878787",
}


def colour_of_run(n: int) -> str:
    """The colour of the n-th run, ``"#rrggbb"``."""
    return RUNS[n % len(RUNS)]
