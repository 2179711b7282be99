"""Records what a training does: the files of a run, trackers, and the time of a batch."""

from taskgroup.recording.clock import Clock, HostTensors
from taskgroup.recording.lock import LOCK, Hold, hold, is_empty
from taskgroup.recording.run_files import (
    HEADER,
    RECORDS,
    Header,
    Line,
    read_header,
    read_lines,
    write_text,
)

__all__ = [
    "HEADER",
    "LOCK",
    "RECORDS",
    "Clock",
    "Header",
    "Hold",
    "HostTensors",
    "Line",
    "hold",
    "is_empty",
    "read_header",
    "read_lines",
    "write_text",
]
