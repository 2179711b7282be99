"""Batches: the same for a seed, from wherever the stream starts and with any number of workers."""

import shutil
from itertools import islice

import pytest
import torch

from taskgroup.lab.data import Augment, BadSampleError, Fit, NYUDv2, all_batches, training_batches
from taskgroup.lab.vision.tasks import NYUD

TASKS = ["depth", "edge"]


def data(minis, **options):
    return NYUDv2(minis / "nyud-v2", tasks=TASKS, transform=Augment((32, 32), NYUD), **options)


def equal(a, b):
    return torch.equal(a.images, b.images) and all(
        torch.equal(a.labels[t], b.labels[t]) and torch.equal(a.masks[t], b.masks[t]) for t in TASKS
    )


def test_a_stream_is_a_function_of_its_seed(minis):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = list(islice(training_batches(data(minis), 4, seed=0), 6))
    assert first[0].images.shape == (4, 3, 32, 32)
    assert first[0].labels["edge"].dtype == first[0].masks["edge"].dtype == torch.bool
    for start in (1, 2, 5):  # two batches an epoch, the ninth sample is left out
        again = islice(training_batches(data(minis), 4, seed=0, start=start), 6 - start)
        assert all(equal(a, b) for a, b in zip(first[start:], again, strict=True))
    other = next(training_batches(data(minis), 4, seed=1))
    assert not equal(first[0], other)
    assert not any(equal(first[0], batch) for batch in first[1:])
    assert torch.equal(state, torch.get_rng_state())


def test_workers_change_nothing(minis):
    alone = islice(training_batches(data(minis), 3, seed=0, start=2), 3)
    helped = islice(training_batches(data(minis), 3, seed=0, start=2, workers=2), 3)
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_an_epoch_has_every_sample_once(minis):
    dataset = data(minis)
    dataset.read = lambda sample: seen.append(sample) or type(dataset).read(dataset, sample)
    seen = []
    list(islice(training_batches(dataset, 3, seed=0), 6))
    assert sorted(seen[:9]) == sorted(seen[9:]) == sorted(dataset.ids)
    assert seen[:9] != seen[9:]


def test_fewer_samples_than_a_batch_takes(minis):
    batch = next(training_batches(data(minis), 20, seed=0))
    assert len(batch.images) == 20
    assert len({image.sum().item() for image in batch.images}) == 20  # each drawn on its own


def test_all_batches_in_order(minis):
    dataset = NYUDv2(minis / "nyud-v2", tasks=TASKS, transform=Fit((80, 80), NYUD))
    batches = list(all_batches(dataset, 4, workers=2))
    assert [len(batch.images) for batch in batches] == [4, 4, 1]
    images = torch.cat([batch.images for batch in batches])
    for image, sample in zip(images, dataset, strict=True):
        assert torch.equal(image, sample.images)
    some = torch.cat([batch.images for batch in all_batches(dataset, 2, limit=3)])
    assert torch.equal(some, images[[0, 4, 8]])


def test_plain_data_loader(minis):
    """As a data set of torch, with its default collation."""
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(data(minis), batch_size=5, shuffle=True)
    images, labels, masks = next(iter(loader))
    assert images.shape == (5, 3, 32, 32)
    assert labels["depth"].shape == masks["depth"].shape == (5, 1, 32, 32)
    dataset = data(minis)
    assert torch.equal(dataset[3, 7].images, dataset[3, 7].images)
    assert not torch.equal(dataset[3].images, dataset[3].images)


def test_skipped_samples_leave_the_rest(minis, tmp_path):
    root = shutil.copytree(minis / "nyud-v2", tmp_path / "nyud")
    (root / "depth" / "left_1.npy").write_bytes(b"\x93NUMPY")
    dataset = NYUDv2(root, tasks=TASKS, transform=Augment((32, 32), NYUD), bad="skip")
    with pytest.warns(
        UserWarning, match="A sample is left out: .*left_1.npy cannot be read"
    ) as said:
        sizes = [len(b.images) for b in islice(training_batches(dataset, 3, seed=0), 6)]
    assert sorted(sizes) == [2, 2, 3, 3, 3, 3]
    assert len(said) == 1  # once, not every epoch
    with pytest.warns(UserWarning, match="left_1"):
        assert sum(len(b.images) for b in all_batches(dataset, 4, workers=1)) == 8
    stopping = NYUDv2(root, tasks=TASKS, transform=Augment((32, 32), NYUD))
    for workers in (0, 1):
        with pytest.raises(BadSampleError, match=r"left_1.npy cannot be read"):
            list(islice(training_batches(stopping, 3, seed=0, workers=workers), 3))


@pytest.mark.filterwarnings("ignore:A sample is left out")
def test_nothing_but_bad_samples(minis, tmp_path):
    root = shutil.copytree(minis / "nyud-v2", tmp_path / "nyud")
    for file in (root / "images").iterdir():
        file.write_bytes(file.read_bytes()[:200])
    dataset = NYUDv2(root, tasks=TASKS, transform=Augment((32, 32), NYUD), bad="skip")
    with pytest.raises(BadSampleError, match=r"No sample of .*nyud, split train, can be read; see"):
        next(training_batches(dataset, 4, seed=0))
