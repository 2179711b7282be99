"""The base class of the three data sets: pairs files by name, and handles bad samples."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from taskgroup.lab.data.files import BadSampleError, read_rgb
from taskgroup.lab.data.plausibility import doubt, doubt_of_image
from taskgroup.lab.vision.samples import Samples
from taskgroup.lab.vision.tasks import Task
from taskgroup.lab.words import listed

__all__ = ["DenseDataset", "Finding", "Scene", "Transform", "file_names", "resized"]


class Scene(NamedTuple):
    """One image with its labels, in NumPy arrays.

    Attributes:
        image: [H, W, 3], uint8 RGB.
        labels: {task: [H, W, C]}: float32 values, or with C = 1 uint8 class numbers or bool.
        masks: {task: [H, W]}, bool: where the label is known.
    """

    image: NDArray[np.uint8]
    labels: dict[str, NDArray[Any]]
    masks: dict[str, NDArray[np.bool_]]


class Finding(NamedTuple):
    """Something wrong or unlikely about a sample, and whether it can be read nevertheless."""

    sample: str
    sentence: str
    usable: bool


#: Brings scenes to one size, with random augmentation or without.
Transform = Callable[[Scene, np.random.Generator], Scene]


class DenseDataset(Dataset[Samples]):
    """Images with one label map per task, read from the public layout without changes.

    Nothing is ever written below the root. The id of a sample names all of its files; other files
    are ignored.

    ``dataset[i]`` is the i-th sample. If ``transform`` is random, ``dataset[i, seed]`` gives the
    same result at every call.

    Args:
        root: folder of the data set.
        split: one of ``SPLITS``; None takes the first.
        tasks: the tasks to read; only their files are needed. None reads all.
        transform: brings a :class:`Scene` to the wanted size; see ``taskgroup.lab.data.augment``.
            None leaves the stored size.
        bad: what to do with a sample whose file is missing, broken or not what it should be.
            ``"stop"`` raises. ``"skip"`` warns and leaves the sample out: from the start if a file
            is missing, and if a file cannot be read by returning a :class:`BadSampleError` in place
            of the sample, which :func:`~taskgroup.lab.data.collate` drops. ``"keep"`` is for
            checks: it opens an incomplete data set, raises for files that cannot be read, and reads
            impossible values as they are.

    Attributes:
        ids: the ids of the samples, in the order of the split.

    Raises:
        ValueError: if the root is not a folder, or there is no such split or task.
        BadSampleError: with ``bad="stop"``, if a file is missing or an id is listed twice.
    """

    #: All tasks of the data set.
    TASKS: ClassVar[Mapping[str, Task]]
    #: ``{split: images in the public release}``; None where it depends on the release.
    SPLITS: ClassVar[Mapping[str, int | None]]
    #: The folder below the root that lists the splits; no other data set has one of this name.
    LISTS: ClassVar[str]
    #: ``{name of a split on the command line: split}``.
    ROLES: ClassVar[Mapping[str, str]]
    #: Whether label maps are resized to their image if both have the same aspect ratio.
    RESIZES: ClassVar[bool] = False
    #: Mean and standard deviation of the channels, for images in [0, 1].
    MEAN: ClassVar[tuple[float, float, float]] = (0.485, 0.456, 0.406)
    STD: ClassVar[tuple[float, float, float]] = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        transform: Transform | None = None,
        bad: Literal["stop", "skip", "keep"] = "stop",
    ) -> None:
        self.root = Path(root)
        self.split = next(iter(self.SPLITS)) if split is None else split
        self.tasks = list(self.TASKS if tasks is None else tasks)
        self.transform = transform
        self.bad = bad
        self._faults: list[str] = []  # with bad="keep": faults of the label that was read last
        name = type(self).__name__
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is not a folder; name the folder that holds {name}.")
        if unknown := [task for task in self.tasks if task not in self.TASKS]:
            raise ValueError(f"{name} has no task {listed(unknown)}; it has {listed(self.TASKS)}.")
        if self.split not in self.SPLITS:
            raise ValueError(f"{name} has no split {split!r}; it has {listed(self.SPLITS)}.")
        if bad not in ("stop", "skip", "keep"):
            raise ValueError(f"bad must be 'stop', 'skip' or 'keep', got {bad!r}.")
        listed_ids = self.listed_ids()
        self.ids = list(dict.fromkeys(listed_ids))
        if bad == "keep":
            return
        findings = list(self.problems(listed_ids))
        problems = [finding.sentence for finding in findings]
        lacking = {finding.sample for finding in findings if not finding.usable}
        self.ids = [sample for sample in self.ids if sample not in lacking]
        if problems:
            more = f", and {len(problems) - 1} more like it" if len(problems) > 1 else ""
            if bad == "stop":
                raise BadSampleError(
                    f"{problems[0].rstrip('.')}{more}; see taskgroup data check {self.root}, or "
                    "leave such samples out with bad='skip' (--set bad=skip)."
                )
            warnings.warn(
                f"{name} leaves samples out: {problems[0].rstrip('.')}{more}.", stacklevel=2
            )
        if not self.ids:
            first = f": {problems[0]}" if problems else "; its list is empty."
            raise ValueError(f"The split {self.split} of {self.root} has no whole sample{first}")

    def list_file(self) -> Path:
        """The file that lists the split."""
        return self.root / self.LISTS / f"{self.split}.txt"

    def listed_ids(self) -> list[str]:
        """The ids that the data set lists for the split, including duplicates.

        Raises:
            ValueError: if the list cannot be read.
        """
        file = self.list_file()
        try:
            lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError):
            raise ValueError(
                f"The list {file} cannot be read; is {self.root} the right folder?"
            ) from None
        return [line for line in lines if line]

    def file(self, name: str, sample: str) -> Path:
        """The file of a sample that holds its ``"image"``, or the label of a task."""
        raise NotImplementedError

    def files(self, sample: str) -> dict[str, tuple[Path, ...]]:
        """All files that a sample needs, ``{"image" or task: paths}``, for the tasks to read."""
        return {name: (self.file(name, sample),) for name in ("image", *self.tasks)}

    def read_label(self, task: str, sample: str) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Read a label, ``[H, W]`` or ``[H, W, C]``, and its mask; None if all of it is known."""
        raise NotImplementedError

    def refuse(self, fault: str | None) -> None:
        """Raise if a label has a fault; with ``bad="keep"``, note the fault instead.

        Raises:
            BadSampleError: if there is a fault, and ``bad`` is not ``"keep"``.
        """
        if fault is None:
            return
        if self.bad != "keep":
            raise BadSampleError(fault)
        self._faults.append(fault)

    def read_image(self, sample: str) -> NDArray[np.uint8]:
        """Read the image, ``[H, W, 3]``."""
        return read_rgb(self.file("image", sample))

    def problems(self, ids: Iterable[str]) -> Iterator[Finding]:
        """Find ids that are listed twice, and ids whose files are not all there.

        Whole folders are listed, since looking up millions of files one by one would take long.
        """
        there: dict[Path, frozenset[str]] = {}
        for sample, times in Counter(ids).items():
            if times > 1:
                sentence = f"{self.list_file()} lists {sample} {times} times."
                yield Finding(sample, sentence, usable=True)
            needed = [path for paths in self.files(sample).values() for path in paths]
            for path in dict.fromkeys(needed):  # two tasks may share a file
                folder = path.parent
                if folder not in there:
                    there[folder] = frozenset(file_names(folder))
                if path.name not in there[folder]:
                    yield Finding(sample, f"{path} is missing.", usable=False)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, sample: str) -> Scene:
        """Read a sample, given by its id, in its stored size.

        Raises:
            BadSampleError: if a file cannot be read or does not have the size of the image, or,
                unless ``bad`` is ``"keep"``, if its values are impossible.
        """
        image = self.read_image(sample)
        labels, masks = {}, {}
        for task in self.tasks:
            labels[task], masks[task] = self._read_label(task, sample, image.shape[:2])
        return Scene(image, labels, masks)

    def inspect(self, sample: str) -> list[Finding]:
        """Find everything that is wrong or unlikely about the files of a sample."""
        try:
            image = self.read_image(sample)
        except BadSampleError as error:
            return [Finding(sample, str(error), usable=False)]
        odd = doubt_of_image(self.file("image", sample), image)
        found = [] if odd is None else [Finding(sample, odd, usable=True)]
        for task in self.tasks:
            try:
                label, known = self._read_label(task, sample, image.shape[:2])
            except BadSampleError as error:
                found.append(Finding(sample, str(error), usable=False))
                continue
            found += [Finding(sample, fault, usable=False) for fault in self._faults]
            if not self._faults and (odd := self.doubt(task, sample, label, known)) is not None:
                found.append(Finding(sample, odd, usable=True))
        return list(dict.fromkeys(found))  # two tasks may share a file

    def doubt(
        self, task: str, sample: str, label: NDArray[Any], known: NDArray[np.bool_]
    ) -> str | None:
        """Return a sentence on what is unlikely about a label [H, W, C], or None."""
        return doubt(self.file(task, sample), self.TASKS[task], label, known)

    def _read_label(
        self, task: str, sample: str, shape: tuple[int, ...]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        self._faults = []
        label, mask = self.read_label(task, sample)
        if self.RESIZES and _alike(label.shape, shape):
            label, mask = resized(label, shape), None if mask is None else resized(mask, shape)
        if label.shape[:2] != shape:
            path = self.file(task, sample)
            raise BadSampleError(
                f"{path} is {label.shape[0]} x {label.shape[1]}, its image is "
                f"{shape[0]} x {shape[1]}."
            )
        known = np.ones(shape, dtype=bool) if mask is None else mask
        return label.reshape(*shape, -1), known

    def __getitem__(self, index: int | tuple[int, int]) -> Samples:
        """Read a sample, given by its index, or by its index and the seed of the transform.

        Raises:
            BadSampleError: if a file is not what it should be; with ``bad="skip"`` the error is
                returned, not raised.
        """
        which, seed = index if isinstance(index, tuple) else (index, None)
        try:
            scene = self.read(self.ids[which])
        except BadSampleError as error:
            if self.bad != "skip":
                raise
            return error  # type: ignore[return-value]  # collate drops it
        if self.transform is not None:
            if seed is None:  # torch's generator, which a DataLoader seeds in each worker
                seed = int(torch.randint(2**63 - 1, (), device="cpu"))
            scene = self.transform(scene, np.random.default_rng(seed))
        return self.to_samples(scene)

    def to_samples(self, scene: Scene) -> Samples:
        """Convert a scene to tensors, without the dimension B."""
        labels = {task: _channels_first(label) for task, label in scene.labels.items()}
        masks = {task: _channels_first(mask[..., None]) for task, mask in scene.masks.items()}
        return Samples(
            self.normalise(_channels_first(scene.image).float().div_(255)), labels, masks
        )

    @classmethod
    def normalise(cls, rgb: torch.Tensor) -> torch.Tensor:
        """Normalise images ``[..., 3, H, W]`` in [0, 1] for the network."""
        return (rgb - _per_channel(cls.MEAN, rgb)).div_(_per_channel(cls.STD, rgb))

    @classmethod
    def to_rgb(cls, images: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`normalise`, for images ``[..., 3, H, W]``, and clamp to [0, 1]."""
        std, mean = _per_channel(cls.STD, images), _per_channel(cls.MEAN, images)
        return (images * std + mean).clamp(0, 1)


def _per_channel(values: tuple[float, ...], images: torch.Tensor) -> torch.Tensor:
    return images.new_tensor(values)[:, None, None]


def _channels_first(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))


def resized(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Resize an array ``[H, W, ...]`` to the height and width of a shape, by nearest pixels."""
    if array.shape[:2] == shape[:2]:
        return array
    rows, columns = (
        np.floor((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(shape[:2], array.shape[:2], strict=True)
    )
    nearest: NDArray[Any] = array.take(rows, axis=0).take(columns, axis=1)
    return nearest


def _alike(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two sizes have the same aspect ratio, up to the rounding of pixels."""
    return abs(shape[0] * other[1] - shape[1] * other[0]) <= max(*shape[:2], *other[:2])


def file_names(folder: Path) -> list[str]:
    """The names in a folder; an empty list if there is no such folder."""
    # os.scandir is faster than Path.iterdir, which makes a Path of each of many thousand files.
    return [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
