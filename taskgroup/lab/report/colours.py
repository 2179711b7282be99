"""The colours that all figures share, in the browser and in PNG files.

Runs are dark and saturated, groups are light, so that no line of a run looks like a group. The runs
differ for readers who do not see red or green, too. All of them are legible on white and on black.
"""

from __future__ import annotations

__all__ = [
    "ALONE",
    "GROUPS",
    "HARMS",
    "INK",
    "RUNS",
    "SECTIONS",
    "SERVES",
    "ZERO",
    "colour_of_run",
]

INK = "#24292f"
#: Of matrices: what lowers a loss, nothing, what raises it (numbers in ink are legible on them).
SERVES, ZERO, HARMS = "#4393c3", "#ececec", "#d6604d"
#: Lines of runs; from the seventh run on they repeat, with other dashes.
RUNS = ("#1f7dc2", "#d55e00", "#3aa273", "#c3097c", "#9250fb", "#b58ebe")
#: Areas of groups; of more groups, some look alike.
GROUPS = (
    *("#77aadd", "#eedd88", "#ee9f86", "#33d8cc", "#aaaa00", "#ffaabb", "#99ddff", "#b7d61d"),
    *("#ed87fc", "#bf965d", "#b1fbbf", "#f7619a", "#bfbefe", "#febe97", "#6ec4dc", "#d9bb66"),
    *("#84dd98", "#fc829d", "#d7f850", "#c2e1b3", "#7af4fe", "#90c139", "#32b1fa", "#d8e147"),
)
#: Tasks that are alone in their group: grey on white and on black.
ALONE = "rgba(128,128,128,0.25)"
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
