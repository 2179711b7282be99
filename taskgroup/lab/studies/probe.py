"""What the workers of an executor have, asked before hours are spent on them."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Mapping
from typing import TypedDict

import torch

import taskgroup as tg
from taskgroup.lab.importing import differing, sources
from taskgroup.lab.problem import make_problem
from taskgroup.lab.processes import visible_gpus
from taskgroup.lab.recipe import Recipe, is_own
from taskgroup.lab.train.trainer import find_device, task_names
from taskgroup.lab.words import listed

__all__ = ["Environment", "check_workers", "probe"]


class Environment(TypedDict):
    """What a process trains with, in builtin types, which pass through any cluster."""

    taskgroup: str  # version
    torch: str  # version, without the part that names the build
    device: str  # "cpu" or "cuda"
    host: str
    gpus: list[str]  # as CUDA_VISIBLE_DEVICES names them; none on the CPU
    source: dict[str, str]  # digests of the files of a problem of the user's own


def probe(recipe: Recipe) -> Environment:
    """What this process has.

    Raises:
        ValueError: if it cannot train the recipe: a file, a task or a GPU is missing.
        ImportError: if a library or a module is missing.
    """
    task_names(recipe, make_problem(recipe))
    device = find_device(recipe.device).type
    return Environment(
        taskgroup=tg.__version__,
        torch=torch.__version__.partition("+")[0],
        device=device,
        host=socket.gethostname(),
        gpus=visible_gpus() if device == "cuda" else [],
        source=_source(recipe),
    )


def check_workers(recipe: Recipe, found: Mapping[str, Environment | BaseException]) -> None:
    """Check that all workers can train a recipe, and alike.

    Args:
        recipe: what they are to train.
        found: ``{worker: what probe returned or raised there}``.

    Raises:
        RuntimeError: if one cannot, or if they differ; the sentence names workers.
    """
    for worker, environment in found.items():
        if isinstance(environment, BaseException):
            reason = " ".join(str(environment).split()).rstrip(".") or repr(environment)
            raise RuntimeError(
                f"{worker} cannot train {recipe.data}: {reason}. Every worker needs taskgroup "
                f"{tg.__version__} with its extra [compare], and the code and files of the data."
            )
        if environment["taskgroup"] != tg.__version__:
            raise RuntimeError(
                f"{worker} has taskgroup {environment['taskgroup']}, and this process has "
                f"{tg.__version__}; install the same version everywhere."
            )
        if changed := differing(_source(recipe), environment["source"]):
            raise RuntimeError(
                f"{worker} has another version of {recipe.data} than this process: "
                f"{listed(changed)} differ; give all workers the same files, and start them "
                "again if the files have changed."
            )
    known = {w: env for w, env in found.items() if not isinstance(env, BaseException)}
    for (one, here), (other, there) in itertools.pairwise(known.items()):
        if here["torch"] != there["torch"]:
            raise RuntimeError(
                f"{one} has torch {here['torch']}, and {other} has {there['torch']}; runs on both "
                "could not be compared, so install the same version everywhere."
            )
        if here["device"] != there["device"]:
            raise RuntimeError(
                f"{one} trains on {here['device']}, and {other} on {there['device']}; runs on both "
                "could not be compared, so take workers of one kind, or --set device=cpu."
            )
    by_gpus: dict[tuple[str, ...], str] = {}
    for worker, env in known.items():
        other = by_gpus.setdefault((env["host"], *env["gpus"]), worker)
        if other != worker and len(env["gpus"]) > 1:
            raise RuntimeError(
                f"{other} and {worker} on {env['host']} see the same {len(env['gpus'])} GPUs and "
                "would both train on the first; give each a GPU of its own with "
                "CUDA_VISIBLE_DEVICES, as `dask cuda worker` does."
            )


def _source(recipe: Recipe) -> dict[str, str]:
    return sources(recipe.data) if is_own(recipe.data) else {}
