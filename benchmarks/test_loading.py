"""Images per second that the data sets read and augment, compared with only decoding their files.

The files are those of ``taskgroup data mini``, enlarged to the sizes of the public data: images are
cut from the photograph at its full size, and labels are enlarged. A side is one pass over six
samples in one process and thread. Every worker of a loader reaches this speed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from skimage.data import stereo_motorcycle
from skimage.morphology import thin

from taskgroup.lab.data import DATASETS, Augment, Resize, Taskonomy
from taskgroup.lab.data.mini import write_mini

PUBLIC = {"nyud-v2": (425, 560), "pascal-context": (375, 500), "taskonomy": (512, 512)}
PAPER = {"nyud-v2": (448, 576), "pascal-context": (512, 512), "taskonomy": (256, 256)}
SPLIT = {"nyud-v2": "train", "pascal-context": "train", "taskonomy": "tiny/train"}
SAMPLES = 6


@pytest.fixture(scope="module", params=DATASETS)
def tree(request, tmp_path_factory):
    """A folder with files as large as those of the public data."""
    name = request.param
    root = tmp_path_factory.mktemp("data") / name
    write_mini(name, root)
    photograph = Image.fromarray(stereo_motorcycle()[0])
    height, width = PUBLIC[name]
    for number, path in enumerate(sorted(root.rglob("*.*"))):
        if path.suffix in (".png", ".jpg"):
            if path.parent.name in ("images", "JPEGImages") or "_domain_rgb" in path.name:
                left = number * 37 % (741 - 500)
                image = photograph.crop((left, 0, left + 500, 500)).resize((width, height))
            else:
                with Image.open(path) as small:
                    image = small.resize((width, height), Image.Resampling.NEAREST)
            if path.parent.name == "edge":  # the public data has lines of one pixel
                image = Image.fromarray((255 * thin(np.asarray(image) > 0)).astype(np.uint8))
            image.save(path)
        elif path.suffix == ".npy":
            np.save(path, enlarged(np.load(path), height, width))
        elif path.suffix == ".mat" and path.parent.name == "trainval":
            labels = enlarged(scipy.io.loadmat(path)["LabelMap"], height, width)
            scipy.io.savemat(path, {"LabelMap": labels}, do_compression=True)
        elif path.suffix == ".mat":
            annotation = scipy.io.loadmat(path)["anno"]
            for thing in annotation[0][0][1][0]:
                thing[2] = enlarged(thing[2], height, width)
                for part in thing[3][0] if thing[3].size else ():
                    part[1] = enlarged(part[1], height, width)
            scipy.io.savemat(path, {"anno": annotation}, do_compression=True)
    return name, root


def enlarged(values, height, width):
    rows, columns = (
        np.arange(new) * old // new for new, old in zip((height, width), values.shape, strict=True)
    )
    return values[np.ix_(rows, columns)]


def decode(path: Path):
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".mat":
        return scipy.io.loadmat(path)
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.usefixtures("one_thread")
def test_loading(record, tree):
    name, root = tree
    kind, size = DATASETS[name], PAPER[name]
    augment = Resize(size, mirror=True) if kind is Taskonomy else Augment(size, kind.TASKS)
    dataset = kind(root, SPLIT[name], transform=augment)
    plain = kind(root, SPLIT[name])
    # Decode a file once, even if two tasks use it.
    files = [
        sorted({path for paths in dataset.files(sample).values() for path in paths})
        for sample in dataset.ids[:SAMPLES]
    ]
    sides = {
        "augmented": lambda: [dataset[index, index] for index in range(SAMPLES)],
        "as stored": lambda: [plain[index] for index in range(SAMPLES)],
        "decoding alone": lambda: [decode(path) for paths in files for path in paths],
    }
    seconds = record.least_seconds(sides)
    each = {side: seconds[side] / SAMPLES for side in sides}
    record.add(
        "a sample",
        len(dataset.tasks),
        each["augmented"],
        {"decoding alone": each["decoding alone"], "as stored": each["as stored"]},
        model=name,
        limit=each["decoding alone"],
        share=record.share("augmented", lambda round_: round_["decoding alone"]),
    )
    record.remark(
        f"{name}: {1 / each['augmented']:.1f} images per second and core, "
        f"{1 / each['decoding alone']:.1f} if they are only decoded."
    )
