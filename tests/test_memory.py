"""The data sets in memory: what is read, in which order, by whom, and that Lightning trains on it."""

import io
import json
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from xzoo.cli import main
from xzoo.data.images import load_rgb
from xzoo.data.memory import CIFAR10, CIFAR100, InMemory, TinyImageNet
from xzoo.data.order import split_validation
from xzoo.data.sources import list_images
from xzoo.datasets import DATASETS, DataSet
from xzoo.errors import DataError
from xzoo.train.task import Classifier

Write = Callable[..., Path]


class Small(InMemory):
    """Four classes of 12-pixel images."""

    key = "small"
    facts = DataSet(
        title="Small-4",
        hub="nobody/small",
        classes=4,
        sides=(12,),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        split="test",
        n=20,
        train=40,
        license="is drawn by a test",
        lossless=True,
    )


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Parquet in the Hub's layout; image i of a part has the value i in its first pixel."""

    def make(
        train: int = 41,
        test: int = 13,
        classes: int = 4,
        side: int = 12,
        label: str = "label",
        **odd: Any,
    ) -> Path:
        root, draw = tmp_path / f"set{len(list(tmp_path.iterdir()))}", np.random.default_rng(0)
        root.mkdir()
        for split, n in (("train", train), ("test", test)):
            labels = [i % classes for i in range(n)]
            images = []
            for i in range(n):
                pixels = draw.integers(0, 256, (side, side, 3)).astype(np.uint8)
                pixels[0, 0] = i % 256
                images.append({"bytes": odd.get(f"{split}{i}", png(pixels)), "path": None})
            kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
            table = pa.table({"image": pa.array(images, kind), label: pa.array(labels, pa.int64())})
            names = {
                "info": {"features": {label: {"names": [f"class {i}" for i in range(classes)]}}}
            }
            pq.write_table(
                table.replace_schema_metadata({"huggingface": json.dumps(names)}),
                root / f"{split}-0.parquet",
            )
        return root

    return make


# the pixels as they are
PLAIN: dict[str, Any] = {"shift": 0, "flip": "none", "mean": (0, 0, 0), "std": (1 / 255,) * 3}


class Rank:
    """What `run_position` reads of a trainer."""

    def __init__(self, rank: int, world: int, done: int = 0) -> None:
        total = type("P", (), {"processed": done})
        progress = type("B", (), {"total": total})
        epoch_loop = type("E", (), {"batch_progress": progress})
        self.fit_loop = type("F", (), {"epoch_loop": epoch_loop})
        self.global_rank, self.world_size, self.limit_train_batches = rank, world, 1.0


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def seen(data: InMemory, loader: Any) -> list[list[int]]:
    """First pixels of the images of each batch: their numbers."""
    return [[round(v) for v in data.batch(places)[0][:, 0, 0, 0].tolist()] for places in loader]


def at(data: InMemory, rank: int, world: int, done: int = 0) -> InMemory:
    data.trainer = Rank(rank, world, done)  # type: ignore[assignment]
    return data


def test_without_a_trainer_the_loaders_give_images(write: Write) -> None:
    data = Small(str(write()), batch_size=8, img_size=20, channels_last=True)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == data.batches_per_epoch() == 5
    for images, labels in batches:
        assert images.shape == (8, *data.input_size) == (8, 3, 20, 20)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
        assert float(images.abs().max()) <= 2
    assert data.num_classes == 4
    assert data.class_names == [f"class {i}" for i in range(4)]


def test_every_step_of_an_epoch_has_the_batch_and_no_image_comes_twice(write: Write) -> None:
    data = Small(str(write()), batch_size=8, **PLAIN)
    loader = at(data, 0, 1).train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append(seen(data, loader))
    for batches in epochs:
        assert [len(b) for b in batches] == [8] * 5
        assert len(set(flat(batches))) == 40
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_step_of_one_process(write: Write, world: int) -> None:
    data = Small(str(write()), batch_size=8, **PLAIN)
    alone = seen(data, at(data, 0, 1).train_dataloader())
    parts = [seen(data, at(data, rank, world).train_dataloader()) for rank in range(world)]
    assert [flat(step) for step in zip(*parts, strict=True)] == alone
    assert data.batches_per_epoch(world) == len(alone)
    validated = [flat(seen(data, at(data, rank, world).val_dataloader())) for rank in range(world)]
    assert sorted(flat(validated)) == list(range(13)), "each image once"


def test_augmentation_does_not_depend_on_ranks_or_batches(write: Write) -> None:
    root = str(write())
    data = Small(root, batch_size=8, cutout=4, crop="resized")
    images, labels = zip(*(data.batch(p) for p in at(data, 0, 1).train_dataloader()), strict=True)
    halves = [[data.batch(p) for p in at(data, rank, 2).train_dataloader()] for rank in range(2)]
    assert torch.equal(
        torch.cat(images), torch.cat([x for step in zip(*halves, strict=True) for x, _ in step])
    )
    other = Small(root, batch_size=4, cutout=4, crop="resized")
    fours, their_labels = zip(*other.train_dataloader(), strict=True)
    assert torch.equal(torch.cat(images), torch.cat(fours))
    assert torch.equal(torch.cat(labels), torch.cat(their_labels))


@pytest.mark.parametrize("done", [0, 3, 5, 13])
def test_a_resumed_run_goes_on_where_it_was(write: Write, done: int) -> None:
    data = Small(str(write()), batch_size=8, **PLAIN)
    loader = at(data, 0, 1).train_dataloader()
    whole = []
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        whole += seen(data, loader)
    resumed = at(data, 0, 1, done).train_dataloader()
    rest = seen(data, resumed)  # before Lightning calls set_epoch
    for epoch in range(done // 5 + 1, 4):
        resumed.sampler.set_epoch(epoch)
        rest += seen(data, resumed)
    assert rest == whole[done:]


def test_held_out_images_are_a_share_of_every_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 31 + [2] * 19)
    for count in (0, 1, 10, 60, 97):
        held, kept = split_validation(labels, count)
        assert sorted([*held.tolist(), *kept.tolist()]) == list(range(100))
        assert len(held) == count
        for c, size in enumerate((50, 31, 19)):
            got = int((labels[held] == c).sum())
            assert abs(got - count * size / 100) <= 1.5, f"class {c}: {got} of {count}"
            assert got < size
    with pytest.raises(
        DataError, match="holdout=98 of 100 training images of 3 classes: use 0 to 97"
    ):
        split_validation(labels, 98)


def test_holdout_is_taken_from_training_and_is_the_same_for_every_seed(write: Write) -> None:
    root = str(write())
    sets = [Small(root, batch_size=33, holdout=8, seed=seed, **PLAIN) for seed in (0, 1)]
    held = [sum(seen(data, at(data, 0, 1).val_dataloader()), []) for data in sets]
    trained = [sum(seen(data, at(data, 0, 1).train_dataloader()), []) for data in sets]
    assert held[0] == held[1]
    for numbers in trained:
        assert sorted(numbers + held[0]) == list(range(41))
    assert len(held[0]) == 8
    assert sum(seen(sets[0], sets[0].test_dataloader()), []) == list(range(13))


def test_smaller_images_are_means_of_areas(write: Write) -> None:
    root = str(write())
    full, half = Small(root, **PLAIN), Small(root, img_size=6, **PLAIN)
    (x, _), (y, _) = next(iter(full.val_dataloader())), next(iter(half.val_dataloader()))
    # rounded to uint8
    torch.testing.assert_close(y, nn.functional.avg_pool2d(x, 2), rtol=0, atol=0.5 + 1e-4)


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({"classes": 5}, {}, "has 5 classes, Small has 4: another data set"),
        ({"side": 16}, {}, r"train-0.parquet:0 has 16 pixels a side, Small has 12: another"),
        (
            {"train7": png(np.zeros((12, 13, 3), np.uint8))},
            {},
            "train-0.parquet:7 is 13 x 12 pixels, others are 12 x 12",
        ),
        ({"train7": b"no image"}, {}, r"train-0.parquet:7 cannot be read \(.*\); mend the data"),
        ({"test": 0}, {}, "no test part with images beside a train part; Small needs both"),
        (
            {"label": "sentiment_score_x"},
            {"batch_size": 64},
            "batch_size=64 for 41 training images and 1 devices",
        ),
        ({}, {"holdout": 38}, "holdout=38 of 41 training images of 4 classes: use 0 to 37"),
        ({}, {"batch_size": 1}, "batch_size=1: batch norm needs two"),
    ],
)
def test_data_that_are_not_the_data_set_are_refused(
    write: Write, made: dict, asked: dict, message: str
) -> None:
    data = Small(str(write(**made)), **asked)
    with pytest.raises(DataError, match=message) as caught:
        data.train_dataloader()
    assert "\n" not in str(caught.value)


def test_a_batch_that_devices_cannot_share_is_refused(write: Write) -> None:
    data = Small(str(write()), batch_size=9)
    with pytest.raises(
        DataError, match=r"batch_size=9 for 41 training images and 2 devices.* use a multiple of 2"
    ):
        at(data, 1, 2).train_dataloader()


def test_columns_that_are_not_images_and_labels_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match="no image column among text, label; expected image or img"):
        CIFAR10(str(tmp_path)).setup()


def test_missing_data_say_where_there_are_some(tmp_path: Path) -> None:
    for kind, hub in (
        (CIFAR10, "uoft-cs/cifar10"),
        (CIFAR100, "uoft-cs/cifar100"),
        (TinyImageNet, "zh-plus/tiny-imagenet"),
    ):
        with pytest.raises(
            DataError,
            match=f"does not exist.*{kind.__name__} is {hub} on the Hub.*CIFAR-100 is the rarest",
        ):
            kind(str(tmp_path / "no" / "such")).setup()


def test_wrong_knobs_are_refused_before_any_image_is_read() -> None:
    with pytest.raises(DataError, match="cutout=40 of images of 32 pixels"):
        CIFAR10("nowhere/at_all", cutout=40)
    with pytest.raises(DataError, match="eval_batch_size=0"):
        CIFAR10("nowhere/at_all", eval_batch_size=0)


class Probe(pl.LightningModule):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shown = nn.Linear(3, 4), []  # type: ignore[var-annotated]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        self.shown.append(images)
        return nn.functional.cross_entropy(self.layer(images.mean((2, 3))), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("n", float(len(batch[1])), reduce_fx="sum", batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def trainer(folder: Path, epochs: int, **arguments: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=str(folder),
        num_sanity_val_steps=0,
        **quiet,
        **arguments,
    )


def test_lightning_sees_the_batches_of_the_loaders_and_a_resume_goes_on(
    write: Write, tmp_path: Path
) -> None:
    root = str(write())
    alone = Probe()
    fit = trainer(tmp_path, 2, enable_checkpointing=False)
    fit.fit(alone, datamodule=Small(root, batch_size=8))
    assert float(fit.callback_metrics["n"]) == 13
    data = Small(root, batch_size=8)
    loader = data.train_dataloader()
    expected = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        expected += [x for x, _ in loader]
    assert len(alone.shown) == 10
    assert all(torch.equal(a, b) for a, b in zip(alone.shown, expected, strict=True))

    # Stopped within the second epoch, and gone on by another process.
    trainer(
        tmp_path, 2, enable_checkpointing=False, callbacks=[SaveAt(7, tmp_path / "last.ckpt")]
    ).fit(Probe(), datamodule=Small(root, batch_size=8))
    rest = Probe()
    trainer(tmp_path, 2, enable_checkpointing=False).fit(
        rest,
        datamodule=Small(root, batch_size=8),
        ckpt_path=str(tmp_path / "last.ckpt"),
        weights_only=True,
    )
    assert len(rest.shown) == 3
    assert all(torch.equal(a, b) for a, b in zip(rest.shown, expected[7:], strict=True))


def test_a_classifier_trains_on_it(write: Write, tmp_path: Path) -> None:
    task = Classifier("x_mobilenet050_c4", 4, mixup=0.2, cutmix=1.0, channels_last=True)
    data = Small(
        str(write(train=17)), batch_size=8, img_size=32, crop="resized", channels_last=True
    )
    fit = trainer(tmp_path, 1, enable_checkpointing=False, log_every_n_steps=1)
    fit.fit(task, datamodule=data)
    assert fit.global_step == 2
    assert 0 <= float(fit.callback_metrics["val/acc1"]) <= 1


@pytest.mark.slow
@pytest.mark.data
def test_cifar10_is_what_it_is(real_data: Path) -> None:
    data = CIFAR10(str(real_data / "cifar10-exact"), batch_size=100, holdout=1000)
    data.setup()
    assert data.dataset == "cifar10"
    assert data.class_names[:3] == ["airplane", "automobile", "bird"]
    val = torch.cat([labels for _, labels in data.val_dataloader()])
    assert val.bincount().tolist() == [100] * 10
    assert data.batches_per_epoch() == 490
    images, labels = data._parts["test"]
    assert (images.shape, len(labels)) == ((10_000, 3, 32, 32), 10_000)
    # The published mean of the training images; the JPEG form is off by a thousand times as much.
    parts = [data._parts[part][0] for part in ("train", "val")]
    mean = sum(part.sum((0, 2, 3)) for part in parts) / (50_000 * 32 * 32 * 255)
    assert mean.tolist() == pytest.approx([0.49139968, 0.48215841, 0.44653091], abs=1e-6)
    assert mean.tolist() == pytest.approx(data.mean, abs=2.5e-4)  # the authors' has fewer digits


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=75)
    return file.getvalue()


@pytest.fixture
def copied(write: Write, monkeypatch: pytest.MonkeyPatch) -> Callable[..., InMemory]:
    """A copy of a data set of 40 training and 20 test images, whole or not."""
    monkeypatch.setitem(DATASETS, Small.key, Small.facts)
    return lambda **made: Small(str(write(**{"train": 40, "test": 20} | made)))


def test_a_whole_copy_has_the_name_and_a_sample_has_none(copied: Callable[..., InMemory]) -> None:
    assert copied().dataset == Small.key
    assert copied(train=4, test=2).dataset is None


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            {"train": 39},
            "39 training and 20 test images, Small-4 has 40 and 20; fetch the data anew",
        ),
        ({"test": 19}, "40 training and 19 test images, Small-4 has 40 and 20"),
        ({"train": 41}, "41 training and 20 test images, Small-4"),
        ({"train": 5, "test": 2}, "5 training and 2 test images, Small-4"),
        (
            {"train7": jpeg(np.zeros((12, 12, 3), np.uint8))},
            "train-0.parquet:7 is a JPEG file, and Small means the",
        ),
        (
            {"test19": jpeg(np.zeros((12, 12, 3), np.uint8))},
            "test-0.parquet:19 is a JPEG file, and Small means the",
        ),
        (
            {"train": 4, "test": 2, "test1": jpeg(np.zeros((12, 12, 3), np.uint8))},
            "test-0.parquet:1 is a JPEG file",
        ),
    ],
)
def test_a_damaged_copy_is_refused_in_one_line(
    copied: Callable[..., InMemory], made: dict, told: str
) -> None:
    data = copied(**made)
    with pytest.raises(DataError, match=told) as caught:
        data.setup()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "refused"), [(CIFAR10, True), (CIFAR100, True), (TinyImageNet, False)]
)
def test_only_tiny_imagenet_is_jpeg_by_itself(
    write: Write, kind: type[InMemory], refused: bool
) -> None:
    first = jpeg(np.zeros((kind.facts.sides[0],) * 2 + (3,), np.uint8))
    classes = kind.facts.classes
    root = write(
        train=classes, test=classes, classes=classes, side=kind.facts.sides[0], train0=first
    )
    if not refused:
        assert kind(str(root)).n_val == kind.facts.classes
        return
    with pytest.raises(
        DataError,
        match=f"train-0.parquet:0 is a JPEG file, and {kind.__name__} means the exact pix",
    ):
        kind(str(root)).setup()


def test_a_lossy_copy_in_files_is_refused_by_the_command(
    write: Write, tmp_path: Path, capsys: Any
) -> None:
    for part, each in (("train", 2), ("test", 1)):
        for label in range(10):
            folder = tmp_path / "jpegs" / part / str(label)
            folder.mkdir(parents=True)
            for i in range(each):
                (folder / f"{i}.jpg").write_bytes(
                    jpeg(np.full((32, 32, 3), label * 20 + i, np.uint8))
                )
    for command in ("fit", "test"):
        weights = (
            ["--model.pretrained", "true", "--model.name", "x_vgg16_2"] if command == "test" else []
        )
        asked = ["--data.root", str(tmp_path / "jpegs"), "--out", str(tmp_path / "run"), *weights]
        assert main([command, "--config", "cifar10/x_vgg16_2", *asked]) == 2
        err = capsys.readouterr().err
        assert (
            err.startswith("xzoo: error: ")
            and err.count("\n") == 1
            and ".jpg is a JPEG file, and CIFAR10" in err
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("size", "interpolation"), [(12, None), (36, "bilinear"), (6, "box")])
def test_what_a_model_folder_says_of_the_images_is_what_validation_did(write, size, interpolation):
    data = Small(str(write()), img_size=size)
    assert data.interpolation == interpolation
    config = {"input_size": data.input_size, "mean": data.mean, "std": data.std, "crop_pct": 1.0}
    transform = create_transform(**config, interpolation=data.interpolation or "bilinear")
    ours, _ = next(iter(data.val_dataloader()))
    listed = list_images(data.root).val
    theirs = torch.stack([transform(load_rgb(item.source)) for item in listed])
    # Pillow rounds to whole numbers where torch does not, between and at the end.
    assert (ours - theirs).abs().max() <= 2.01 / 255 / 0.25
