"""Order and augmentation are functions of (seed, epoch, index): not of workers, batches, ranks or
resumes.
"""

import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from xzoo.data import loader as loader_module
from xzoo.data.imagenet import stacked
from xzoo.data.order import EvalOrder, TrainOrder, key, keys, permutation
from xzoo.data.photos import ImageModule
from xzoo.data.scan import read
from xzoo.errors import DataError, XzooError

CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
}


def test_keys_are_the_same_on_every_machine_and_release():
    index = torch.arange(4)
    # Renew with: print(keys(1, 2, 3, torch.arange(4)).tolist())
    assert keys(1, 2, 3, index).tolist() == [2877974829, 2939632500, 4208540807, 2864473282]
    assert [key(1, 2, 3, i) for i in range(4)] == [2877974829, 2939632500, 4208540807, 2864473282]
    assert permutation(0, 0, 8).tolist() == [0, 6, 2, 7, 1, 3, 4, 5]


def test_keys_are_uniform_and_independent():
    n = 9 * 4000
    one, two = (keys(0, epoch, 0, torch.arange(n)) * 9 >> 32 for epoch in (0, 1))
    joint = torch.bincount(one * 9 + two, minlength=81).double()
    chi = ((joint - n / 81) ** 2 / (n / 81)).sum()
    assert 40 < chi < 130  # 80 degrees of freedom: 80 +- 13


@pytest.mark.parametrize(
    ("n", "size"), [(2, 2), (3, 2), (7, 3), (64, 64), (65, 64), (129, 64), (10, 100)]
)
def test_an_epoch_shows_every_image_once_and_forms_no_batch_of_one(n, size):
    order = TrainOrder(n, size)
    batches = list(order)
    assert len(batches) == len(order)
    assert sorted(i for batch in batches for _, i in batch) == list(range(n))
    sizes = [len(batch) for batch in batches]
    assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1 and max(sizes) <= size + 1


def test_epochs_and_seeds_have_other_orders():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = TrainOrder(50, 8, seed)
        order.set_epoch(epoch)
        assert {e for batch in order for e, _ in batch} == {epoch}
        orders.append([i for batch in order for _, i in batch])
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_one_process(world):
    whole = list(TrainOrder(50, 12))
    parts = [list(TrainOrder(50, 12, rank=r, world=world)) for r in range(world)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [place for share in shares for place in share] == batch
        assert min(map(len, shares)) >= 2


@pytest.mark.parametrize("done", [0, 3, 5, 7, 10])
def test_a_resumed_order_goes_on_where_it_was(done):
    whole = TrainOrder(50, 10)
    seen = [batch for epoch in range(4) for batch in (whole.set_epoch(epoch), list(whole))[1]]
    resumed = TrainOrder(50, 10, done=done)
    first = list(resumed)  # before set_epoch, as Lightning's loader fetches
    assert first == seen[done : 5 * (done // 5) + 5]
    resumed.set_epoch(done // 5)
    assert list(resumed) == first
    resumed.set_epoch(done // 5 + 1)
    assert list(resumed) == seen[5 * (done // 5) + 5 : 5 * (done // 5) + 10]


@pytest.mark.parametrize(("n", "size", "world"), [(13, 4, 1), (13, 4, 2), (13, 4, 3), (3, 5, 2)])
def test_validation_counts_every_image_once(n, size, world):
    seen = [i for r in range(world) for batch in EvalOrder(n, size, r, world) for _, i in batch]
    assert sorted(seen) == list(range(n))


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(DataError, match="batch_size=1: batch norm needs two"):
        TrainOrder(10, 1)
    with pytest.raises(DataError, match="3 training images for 2 devices"):
        TrainOrder(3, 4, world=2)


def batches(module: ImageModule, epoch: int) -> list[torch.Tensor]:
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return [images for images, _ in loader]


@pytest.fixture
def photos(make_folder):
    return read(make_folder(each=7))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_do_not_depend_on_workers_or_batch_size(photos, workers):
    plain = torch.cat(batches(ImageModule(photos, CONFIG, batch_size=4, workers=0), 1))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    other = ImageModule(photos, CONFIG, batch_size=5, workers=workers)
    assert torch.equal(torch.cat(batches(other, 1)), plain)
    assert not torch.equal(torch.cat(batches(other, 2)), plain)


def test_the_streams_of_others_are_left_alone(photos):
    module = ImageModule(photos, CONFIG, workers=0)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    batches(module, 0)
    assert (random.random(), np.random.rand(), torch.rand(1)) == wanted


def test_mirror_images_only_where_they_keep_their_class(make_folder):
    half = np.zeros((24, 24, 3), np.uint8)
    half[:, 12:] = 200  # the left half is black
    root = make_folder(each=7)
    for number, file in enumerate(sorted(root.rglob("*.png"))):
        half[0, 0] = number  # no two files are identical, as those would all be on one side
        Image.fromarray(half).save(file)
    photos = read(root)
    for mirror in (False, True):
        module = ImageModule(photos, CONFIG, crop=1.0, mirror=mirror, workers=0)
        seen = torch.cat([b for epoch in range(4) for b in batches(module, epoch)])
        turned = seen[:, :, :, 0].mean((1, 2)) > seen[:, :, :, -1].mean((1, 2))
        assert turned.any().item() is mirror and not turned.all()


def test_batch_norm_never_meets_one_image(photos):
    net = nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4)).train()  # its map is 1 x 1
    photos = type(photos)(**{**vars(photos), "train": type(photos.train)(photos.train.items[:9])})
    for images in batches(ImageModule(photos, CONFIG, batch_size=8, workers=0), 0):
        net(images)


# ---- what a machine has too little of


@pytest.fixture
def small_shared_memory(monkeypatch, tmp_path):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(loader_module.shutil, "disk_usage", lambda place: full)
    monkeypatch.setattr(loader_module, "SHARED", tmp_path)
    monkeypatch.setattr(loader_module, "_say_once", loader_module._say_once.__wrapped__)


def test_a_batch_through_pipes_lies_in_memory_as_any_other(photos, small_shared_memory):
    """The caller's collate makes it: ImageNet's leaves images pixel by pixel."""
    views = loader_module.Views(photos.val, ImageModule(photos, CONFIG).eval_transform, None)
    found = []
    for workers in (0, 2):
        loader = loader_module.Loader(
            views, EvalOrder(len(views), 4), workers, stacked, batch_bytes=10**6
        )
        assert loader._by_pipe == (workers > 0)
        found.append(list(loader))
    for (here, labels), (piped, same) in zip(*found, strict=True):
        assert torch.equal(here, piped) and torch.equal(labels, same)
        assert here.stride() == piped.stride() and labels.dtype == same.dtype
        assert piped.is_contiguous(memory_format=torch.channels_last)


def test_batches_come_through_pipes_where_shared_memory_is_small(
    photos, small_shared_memory, caplog
):
    wanted = torch.cat(batches(ImageModule(photos, CONFIG, batch_size=4, workers=0), 1))
    module = ImageModule(photos, CONFIG, batch_size=4, workers=2)
    assert torch.equal(torch.cat(batches(module, 1)), wanted)
    assert all(
        kind is torch.Tensor for batch in module.val_dataloader() for kind in map(type, batch)
    )
    assert (
        "0 MB free" in caplog.records[0].getMessage() and "\n" not in caplog.records[0].getMessage()
    )


SMALL = """
import sys
from xzoo.data.photos import ImageModule
from xzoo.data.scan import read
config = dict(input_size=(3, 128, 128), interpolation="bicubic", crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
module = ImageModule(read(sys.argv[1]), config, batch_size=8, workers=2)
print(sum(len(images) for images, _ in module.train_dataloader()), len(module.data.train))
"""


@pytest.mark.slow
def test_a_small_dev_shm_is_no_error(make_folder):
    """A mount of its own: 1 MB, as the report has it (a container has 64)."""
    inside = 'mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77; exec "$@"'
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        inside,
        "sh",
        sys.executable,
        "-c",
        SMALL,
        str(make_folder(each=20)),
    ]
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode in (1, 77) and "ermitted" in told.stderr:
        pytest.skip("no mount of its own is permitted here")
    assert told.returncode == 0, told.stderr
    seen, there = told.stdout.split()
    assert (
        seen == there and told.stderr.count("\n") == 1 and "/dev/shm has 1 MB free" in told.stderr
    )


def killed(image):
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is full


def out_of_memory(image):
    raise MemoryError("Unable to allocate 9 GiB")


def out_of_shared_memory(image):
    raise RuntimeError("unable to write to file </torch_1_2_0>: No space left on device (28)")


@pytest.mark.parametrize("fault", [killed, out_of_memory, out_of_shared_memory])
def test_a_worker_that_the_machine_ends_is_told_in_one_line(photos, fault):
    module = ImageModule(photos, CONFIG, batch_size=4, workers=1)
    module.train_transform = fault
    with pytest.raises(
        XzooError, match=r"workers=1: a process that loads images ended .*use fewer workers"
    ) as caught:
        batches(module, 0)
    assert "\n" not in str(caught.value)


def test_a_bug_in_a_worker_stays_one(photos):
    module = ImageModule(photos, CONFIG, batch_size=4, workers=1)
    module.train_transform = None
    with pytest.raises(TypeError, match="not callable"):
        batches(module, 0)
