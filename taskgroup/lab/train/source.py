"""The source of a problem of the user's own, noted beside what was trained on it."""

from __future__ import annotations

import warnings
from pathlib import Path

import yaml

import taskgroup as tg
from taskgroup.lab.importing import differing, sources
from taskgroup.lab.recipe import is_own
from taskgroup.lab.words import listed

__all__ = ["SOURCE", "changed_source", "check_source", "note_source"]

#: The file: a digest of each source file, without comments and layout.
SOURCE = "source.yaml"


def note_source(folder: Path, data: str) -> None:
    """Write the digests of a problem of the user's own to a folder; of another, nothing."""
    if is_own(data) and (now := sources(data)):
        tg.recording.write_text(folder / SOURCE, yaml.safe_dump(now))


def changed_source(folder: Path, data: str) -> list[str]:
    """The files that have changed since :func:`note_source`; none if nothing was noted."""
    file = folder / SOURCE
    if not is_own(data) or not file.is_file():
        return []
    return differing(yaml.safe_load(file.read_text()) or {}, sources(data))


def check_source(folder: Path, data: str) -> None:
    """Note the source in a folder of results, or compare it if there are results already.

    Results of a changed problem are refused, not warned about: in a table they would look like an
    effect of the method, and nothing in it would show that they are not.

    Raises:
        ValueError: if the folder has results of another version of the problem.
    """
    if not is_own(data):
        return
    if not sources(data):
        warnings.warn(
            f"The source of {data} cannot be read, so nothing shows whether the results in "
            f"{folder} are of this version.",
            stacklevel=3,
        )
    elif not (folder / SOURCE).is_file() or not any((folder / "cells").glob("*.json")):
        note_source(folder, data)
    elif changed := changed_source(folder, data):
        raise ValueError(
            f"{folder} holds results of another version of {data}: {listed(changed)} changed "
            "since. Name another folder with --out. If the change cannot affect the results, "
            f"delete {folder / SOURCE}, and they are used."
        )
