"""The source behind the results in a folder: results of two versions are not mixed."""

from __future__ import annotations

import warnings
from pathlib import Path

import yaml

import taskgroup as tg
from taskgroup.lab.importing import sources
from taskgroup.lab.recipe import is_own
from taskgroup.lab.words import listed

__all__ = ["check_source"]

_FILE = "source.yaml"


def check_source(folder: Path, data: str) -> None:
    """Note the source of a problem of the user's own in a folder of results, or compare it.

    ``source.yaml`` holds a digest of each source file, without comments and layout. Results of a
    changed problem are refused, not warned about: in a table they would look like an effect of the
    method, and nothing in it would show that they are not.

    Raises:
        ValueError: if the folder has results of another version of the problem.
    """
    if not is_own(data):
        return
    now, file = sources(data), folder / _FILE
    if not now:
        warnings.warn(
            f"The source of {data} cannot be read, so nothing shows whether the results in "
            f"{folder} are of this version.",
            stacklevel=3,
        )
        return
    if not file.is_file() or not any((folder / "cells").glob("*.json")):
        tg.recording.write_text(file, yaml.safe_dump(now))
        return
    then = yaml.safe_load(file.read_text()) or {}
    if changed := [name for name in sorted({*now, *then}) if now.get(name) != then.get(name)]:
        raise ValueError(
            f"{folder} holds results of another version of {data}: {listed(changed)} changed "
            "since. Name another folder with --out. If the change cannot affect the results, "
            f"delete {file}, and they are used."
        )
