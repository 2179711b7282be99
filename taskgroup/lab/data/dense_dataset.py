"""What the three data sets share: samples paired by name, and what happens to bad ones."""

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
from taskgroup.lab.data.samples import Samples
from taskgroup.lab.vision.tasks import Task
from taskgroup.lab.words import listed

__all__ = ["DenseDataset", "Finding", "Scene", "Transform", "file_names", "resized"]


class Scene(NamedTuple):
    """One image with its labels, as large as they are stored.

    Attributes:
        image: [H, W, 3], uint8 RGB.
        labels: {task: [H, W, C]}: float32 values; uint8 class numbers and bool, of which C is 1.
        masks: {task: [H, W]}, bool: where the label is known.
    """

    image: NDArray[np.uint8]
    labels: dict[str, NDArray[Any]]
    masks: dict[str, NDArray[np.bool_]]


class Finding(NamedTuple):
    """What is wrong or odd about a sample.

    Attributes:
        sample: its id.
        sentence: what is wrong.
        usable: whether the sample can be read all the same.
    """

    sample: str
    sentence: str
    usable: bool


#: What makes samples of one size, at random or not.
Transform = Callable[[Scene, np.random.Generator], Scene]


class DenseDataset(Dataset[Samples]):
    """Images with one label map per task, read from a public layout as it is.

    Nothing is ever written below the root. Samples are paired by name: the files of one sample are
    those of its id, whatever else lies beside them.

    ``dataset[i]`` is the i-th sample; with a random ``transform``, ``dataset[i, seed]`` is the same
    one at every call.

    Args:
        root: folder of the data set.
        split: one of ``SPLITS``; None is the first.
        tasks: those to read, None is all; only their files are needed.
        transform: makes :class:`Scene` into one of the wanted size; see
            ``taskgroup.lab.data.augment``. None leaves the stored size.
        bad: what to do with a sample whose file is missing, broken or not what it should be:
            ``"stop"`` raises; ``"skip"`` says it in a warning and leaves the sample out: missing
            files at once, what is found on reading as a :class:`BadSampleError` in the sample's
            place, which :func:`~taskgroup.lab.data.collate` drops; ``"keep"``, for
            checks, opens a data set whatever it lacks, raises for what cannot be read, and reads
            values that cannot be right as they are.

    Attributes:
        ids: of the samples, in the order of the split.

    Raises:
        ValueError: if the root is no folder, or there is no such split or task.
        BadSampleError: with ``bad="stop"``, if a file is missing or an id is listed twice.
    """

    #: All tasks of the data set.
    TASKS: ClassVar[Mapping[str, Task]]
    #: ``{split: images in the public release}``; None where it depends on the release.
    SPLITS: ClassVar[Mapping[str, int | None]]
    #: The folder below the root that lists the splits; no other data set has one of this name.
    LISTS: ClassVar[str]
    #: ``{what the command line calls it: split}``.
    ROLES: ClassVar[Mapping[str, str]]
    #: Whether maps of another size than their image, but of its shape, are brought to it.
    RESIZES: ClassVar[bool] = False
    #: Mean and standard deviation of the channels, images being in [0, 1].
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
        self._faults: list[str] = []  # of the label that was read last, with bad="keep"
        name = type(self).__name__
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is no folder; name the one that holds {name}.")
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
        """The ids of the split as the data set lists them, twice where they are listed twice.

        Raises:
            ValueError: if the list cannot be read.
        """
        file = self.list_file()
        try:
            lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError):
            raise ValueError(
                f"{file} cannot be read, the list of a split; is {self.root} the right folder?"
            ) from None
        return [line for line in lines if line]

    def files(self, sample: str) -> dict[str, tuple[Path, ...]]:
        """``{"image" or task: files}`` that an id needs, for the image and the tasks to read."""
        raise NotImplementedError

    def read_label(self, task: str, sample: str) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """The label ``[H, W]`` or ``[H, W, C]``, and where it is known; None is everywhere."""
        raise NotImplementedError

    def refuse(self, fault: str | None) -> None:
        """Refuse a label for what its values say, if anything; with ``bad="keep"`` note it.

        Raises:
            BadSampleError: with the fault, unless ``bad`` is ``"keep"``.
        """
        if fault is None:
            return
        if self.bad != "keep":
            raise BadSampleError(fault)
        self._faults.append(fault)

    def read_image(self, sample: str) -> NDArray[np.uint8]:
        """The image ``[H, W, 3]``."""
        return read_rgb(self.files(sample)["image"][0])

    def problems(self, ids: Iterable[str]) -> Iterator[Finding]:
        """What is wrong with some ids, going by names: listed twice, or without all their files.

        Folders are listed, not files looked up one by one: a data set has millions of them.
        """
        there: dict[Path, frozenset[str]] = {}
        for sample, times in Counter(ids).items():
            if times > 1:
                sentence = f"{self.list_file()} lists {sample} {times} times."
                yield Finding(sample, sentence, usable=True)
            needed = [path for paths in self.files(sample).values() for path in paths]
            for path in dict.fromkeys(needed):  # two tasks may be of one file
                folder = path.parent
                if folder not in there:
                    there[folder] = frozenset(file_names(folder))
                if path.name not in there[folder]:
                    yield Finding(sample, f"{path} is missing.", usable=False)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, sample: str) -> Scene:
        """A sample as it is stored.

        Args:
            sample: its id.

        Raises:
            BadSampleError: if a file cannot be read, its size is not that of the image, or, unless
                ``bad`` is ``"keep"``, its values cannot be what the layout says.
        """
        image = self.read_image(sample)
        labels, masks = {}, {}
        for task in self.tasks:
            labels[task], masks[task] = self._read_label(task, sample, image.shape[:2])
        return Scene(image, labels, masks)

    def inspect(self, sample: str) -> list[Finding]:
        """All that is wrong or odd about the files of an id."""
        try:
            image = self.read_image(sample)
        except BadSampleError as error:
            return [Finding(sample, str(error), usable=False)]
        odd = doubt_of_image(self.files(sample)["image"][0], image)
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
        return list(dict.fromkeys(found))  # two tasks may be of one file

    def doubt(
        self, task: str, sample: str, label: NDArray[Any], known: NDArray[np.bool_]
    ) -> str | None:
        """What is odd about a label that can be read, as a sentence; None if nothing is.

        Args:
            task: what it is of.
            sample: whose it is.
            label: [H, W, C].
            known: [H, W].
        """
        return doubt(self.files(sample)[task][0], self.TASKS[task], label, known)

    def _read_label(
        self, task: str, sample: str, shape: tuple[int, ...]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        self._faults = []
        label, mask = self.read_label(task, sample)
        if self.RESIZES and _alike(label.shape, shape):
            label, mask = resized(label, shape), None if mask is None else resized(mask, shape)
        if label.shape[:2] != shape:
            path = self.files(sample)[task][0]
            raise BadSampleError(
                f"{path} is {label.shape[0]} x {label.shape[1]}, its image is "
                f"{shape[0]} x {shape[1]}."
            )
        known = np.ones(shape, dtype=bool) if mask is None else mask
        return label.reshape(*shape, -1), known

    def __getitem__(self, index: int | tuple[int, int]) -> Samples:
        """A sample, without the dimension B.

        Args:
            index: which; or which and the seed of the transform.

        Raises:
            BadSampleError: with ``bad="stop"``, if a file is not what it should be; with
                ``"skip"`` it is returned.
        """
        which, seed = index if isinstance(index, tuple) else (index, None)
        try:
            scene = self.read(self.ids[which])
        except BadSampleError as error:
            if self.bad != "skip":
                raise
            return error  # type: ignore[return-value]  # collate drops it
        if self.transform is not None:
            if seed is None:  # from torch's generator, which a DataLoader seeds in its workers
                seed = int(torch.randint(2**63 - 1, (), device="cpu"))
            scene = self.transform(scene, np.random.default_rng(seed))
        return self.to_samples(scene)

    def to_samples(self, scene: Scene) -> Samples:
        """A scene as tensors, without the dimension B."""
        labels = {task: _channels_first(label) for task, label in scene.labels.items()}
        masks = {task: _channels_first(mask[..., None]) for task, mask in scene.masks.items()}
        return Samples(self.normalise(_channels_first(scene.image).float() / 255), labels, masks)

    @classmethod
    def normalise(cls, rgb: torch.Tensor) -> torch.Tensor:
        """Images ``[..., 3, H, W]`` in [0, 1], as the network takes them."""
        return (rgb - _per_channel(cls.MEAN, rgb)) / _per_channel(cls.STD, rgb)

    @classmethod
    def to_rgb(cls, images: torch.Tensor) -> torch.Tensor:
        """Images ``[..., 3, H, W]`` as the network takes them, in [0, 1] to be shown."""
        std, mean = _per_channel(cls.STD, images), _per_channel(cls.MEAN, images)
        return (images * std + mean).clamp(0, 1)


def _per_channel(values: tuple[float, ...], images: torch.Tensor) -> torch.Tensor:
    return images.new_tensor(values)[:, None, None]


def _channels_first(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))


def resized(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The nearest pixels of an array ``[H, W, ...]`` in another shape."""
    if array.shape[:2] == shape[:2]:
        return array
    rows, columns = (
        np.floor((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(shape[:2], array.shape[:2], strict=True)
    )
    nearest: NDArray[Any] = array.take(rows, axis=0).take(columns, axis=1)
    return nearest


def _alike(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two sizes are one at another scale, up to the rounding of pixels."""
    return abs(shape[0] * other[1] - shape[1] * other[0]) <= max(*shape[:2], *other[:2])


def file_names(folder: Path) -> list[str]:
    """The names in a folder; none if there is no such folder."""
    # Of folders of many thousand files, for which Path.iterdir makes as many paths.
    return [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
