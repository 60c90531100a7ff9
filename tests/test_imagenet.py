"""ImageNet's three forms: each is the same images, in the same order, whoever decodes them."""

import io
import json
import os
import pickle
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from xzoo.data import imagenet
from xzoo.data.imagenet import ImageNet
from xzoo.errors import DataError

CLASSES = ("n01440764", "n01443537", "n10000000", "n02")  # text order differs from this one
SORTED = sorted(CLASSES)
SMALL: dict[str, Any] = {
    "num_classes": 4,
    "batch_size": 4,
    "eval_batch_size": 3,
    "img_size": 16,
    "workers": 0,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XZOO_HOME", str(tmp_path_factory.mktemp("home")))


def png(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    file = io.BytesIO()
    pixels = (
        np.random.default_rng(seed)
        .integers(0, 256, (size[1] // 4, size[0] // 4, 3))
        .astype(np.uint8)
    )
    Image.fromarray(pixels).resize(size).save(file, "PNG")
    return file.getvalue()


def images(part: str) -> list[tuple[str, str, bytes]]:
    """Class, file name and bytes of each image, class by class: 5 of each in train, 2 in val."""
    first, each = (0, 5) if part == "train" else (100, 2)
    return [
        (name, f"{name}_{i}.JPEG", png(first + 10 * c + i))
        for c, name in enumerate(SORTED)
        for i in range(each)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for name, file, content in images(part):
            place = tmp_path / "folder" / part / name
            place.mkdir(parents=True, exist_ok=True)
            (place / file).write_bytes(content)
            (place / "._junk.png").write_bytes(b"")
            (place / "notes.txt").write_text("no image")
    return tmp_path / "folder"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    root.mkdir()
    for part in ("train", "val"):
        rows = images(part)
        for number in range(2):
            members: list[tuple[str, bytes]] = []
            for name, file, content in rows[
                number * len(rows) // 2 : (number + 1) * len(rows) // 2
            ]:
                stem = file.split(".")[0]
                members += [
                    (f"{stem}.cls", str(SORTED.index(name)).encode()),
                    (f"{stem}.jpg", content),
                ]
                members += [(f"{stem}.json", b"{}")]
            write_tar(root / f"{part}-{number:06d}.tar", members)
    return root


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    root = tmp_path / "tables"
    root.mkdir()
    for part, split in (("train", "train"), ("val", "validation")):
        rows = images(part)
        column = [{"bytes": content, "path": file} for _, file, content in rows]
        table = pa.table({"image": column, "label": [SORTED.index(name) for name, _, _ in rows]})
        names = {"info": {"features": {"label": {"names": SORTED}}}}
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(names)}),
            root / f"{split}-0.parquet",
        )
    return root


Batches = list[tuple[Tensor, Tensor]]


def epochs(data: ImageNet, count: int = 2) -> Batches:
    loader, result = data.train_dataloader(), []
    for epoch in range(count):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        result += list(loader)
    return result


def same(ones: Batches, others: Batches) -> bool:
    pairs = zip(ones, others, strict=True)
    return all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in pairs)


def test_the_three_forms_show_the_same(folder: Path, shards: Path, tables: Path) -> None:
    sets = [
        ImageNet(str(root), auto_augment="rand-m5", re_prob=0.5, **SMALL)
        for root in (folder, shards, tables)
    ]
    trained, validated = (
        [epochs(data) for data in sets],
        [list(data.val_dataloader()) for data in sets],
    )
    assert same(trained[0], trained[1])
    assert same(trained[0], trained[2])
    assert same(validated[0], validated[1])
    assert same(validated[0], validated[2])
    assert len(trained[0]) == 10
    assert torch.cat([y for _, y in validated[0]]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [data.class_names for data in sets] == [SORTED, ["0", "1", "2", "3"], SORTED]


def test_evaluation_is_timms_own(folder: Path) -> None:
    data = ImageNet(str(folder), crop_pct=0.8, **SMALL)
    transform = create_transform((3, 16, 16), interpolation="bicubic", crop_pct=0.8)
    expected = [
        transform(Image.open(io.BytesIO(content)).convert("RGB")) for _, _, content in images("val")
    ]
    assert torch.equal(torch.cat([x for x, _ in data.val_dataloader()]), torch.stack(expected))


def test_an_epoch_is_others_again_and_steps_are_alike(folder: Path) -> None:
    batches = epochs(ImageNet(str(folder), **SMALL))
    assert [len(y) for _, y in batches] == [4] * 10
    assert not same(batches[:5], batches[5:])
    labels = torch.cat([y for _, y in batches[:5]])
    assert Counter(labels.tolist()) == {0: 5, 1: 5, 2: 5, 3: 5}


@pytest.mark.parametrize("form", ["folder", "shards", "tables"])
def test_workers_and_batches_change_no_image(form: str, request: pytest.FixtureRequest) -> None:
    root = str(request.getfixturevalue(form))
    alone = epochs(ImageNet(root, re_prob=0.5, **SMALL))
    helped = epochs(ImageNet(root, re_prob=0.5, **SMALL | {"workers": 1, "batch_size": 2}))
    assert torch.equal(torch.cat([x for x, _ in alone]), torch.cat([x for x, _ in helped]))
    # What a worker is sent where processes are spawned.
    dataset = pickle.loads(pickle.dumps(ImageNet(root, **SMALL).val_dataloader().dataset))
    assert dataset[0, 1][1] == 0


def at(data: ImageNet, rank: int, world: int, done: int = 0) -> ImageNet:
    total = SimpleNamespace(processed=done)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))
    known = {"global_rank": rank, "world_size": world, "fit_loop": loop, "limit_train_batches": 1.0}
    data.trainer = SimpleNamespace(**known)  # type: ignore[assignment]
    return data


def test_ranks_share_each_step_and_validate_each_image_once(folder: Path) -> None:
    data = ImageNet(str(folder), **SMALL)
    alone = list(at(data, 0, 1).train_dataloader())
    halves = [list(at(data, rank, 2).train_dataloader()) for rank in range(2)]
    for whole, one, other in zip(alone, *halves, strict=True):
        assert torch.equal(torch.cat([one[0], other[0]]), whole[0])
    parts = [torch.cat([x for x, _ in at(data, rank, 3).val_dataloader()]) for rank in range(3)]
    assert sorted(map(len, parts)) == [2, 3, 3]
    assert len(torch.cat(parts).flatten(1).unique(dim=0)) == 8
    with pytest.raises(DataError, match="batch_size=7 for 20 training images and 3 devices"):
        at(ImageNet(str(folder), **SMALL | {"batch_size": 7}), 0, 3).train_dataloader()


def test_a_resumed_run_goes_on_where_it_was(folder: Path) -> None:
    data = ImageNet(str(folder), **SMALL)
    loader = at(data, 0, 1, 0).train_dataloader()
    whole = list(loader)
    loader.batch_sampler.set_epoch(1)  # type: ignore[union-attr]
    whole += list(loader)
    assert same(list(at(data, 0, 1, 7).train_dataloader()), whole[7:])


def test_the_device_normalises_what_the_workers_leave_as_bytes(folder: Path) -> None:
    plain = ImageNet(str(folder), **SMALL)
    expected = next(iter(plain.train_dataloader()))
    data = at(ImageNet(str(folder), channels_last=True, **SMALL), 0, 1)
    batch = next(iter(data.train_dataloader()))
    assert batch[0].dtype == torch.uint8
    x, y = data.on_after_batch_transfer(batch, 0)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, expected[1])
    # Two roundings against torchvision's three, of values up to 2.7.
    torch.testing.assert_close(x, expected[0], rtol=0, atol=1e-6)


def test_held_out_images_do_not_train(folder: Path) -> None:
    data = ImageNet(str(folder), holdout=8, hflip=0, scale=(1, 1), ratio=(1, 1), **SMALL)
    assert data.batches_per_epoch() == 3
    held = torch.cat([y for _, y in data.val_dataloader()])
    assert held.bincount().tolist() == [2] * 4
    assert torch.cat([y for _, y in epochs(data, 1)]).bincount().tolist() == [3] * 4
    assert len(list(data.test_dataloader())) == 3


@pytest.mark.parametrize(("form", "workers"), [("folder", 0), ("folder", 1), ("shards", 0)])
def test_an_image_that_cannot_be_read_is_named(
    form: str, workers: int, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(form)
    name = f"{SORTED[1]}_1"
    if form == "folder":
        (root / "val" / SORTED[1] / f"{name}.JPEG").write_bytes(images("val")[3][2][:200])
    else:
        shard = root / "val-000000.tar"
        content = images("val")[3][2]
        shard.write_bytes(shard.read_bytes().replace(content, bytes(len(content))))
    data = ImageNet(str(root), **SMALL | {"workers": workers})
    with pytest.raises(DataError, match=rf"{name}.* cannot be read \(.*\); mend it"):
        list(data.val_dataloader())


def test_the_index_of_shards_is_made_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list(ImageNet(str(shards), **SMALL).val_dataloader())
    (home,) = Path(os.environ["XZOO_HOME"]).iterdir()
    assert (home.name, len(list(home.iterdir()))) == ("shards", 2)

    def fail(shard: Path) -> None:
        raise AssertionError(f"{shard} is read again")

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "_members", fail)
        assert same(list(ImageNet(str(shards), **SMALL).val_dataloader()), first)
    # A shard that changed, and an index that is broken, are read again.
    write_tar(
        shards / "val-000001.tar", [("a/b.x.cls", b"3"), ("a/b.cls", b"2"), ("a/b.JPG", png(0))][1:]
    )
    assert torch.cat([y for _, y in ImageNet(str(shards), **SMALL).val_dataloader()]).tolist() == [
        0,
        0,
        1,
        1,
        2,
    ]
    for file in home.iterdir():
        file.write_bytes(b"PK\x03\x04 half")
    assert len(list(ImageNet(str(shards), **SMALL).train_dataloader())) == 5


def test_the_cache_is_where_the_platform_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XZOO_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert imagenet.home() == tmp_path / "xzoo"


Spoil = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        (
            "folder",
            lambda r: (r / "val").rename(r / "rest"),
            "no train/ and val/ in it, and no tar shards",
        ),
        (
            "folder",
            lambda r: (r / "val" / "n02").rename(r / "val" / "n03"),
            "only in train: n02; only in val: n03",
        ),
        (
            "folder",
            lambda r: [(d.rename(r / d.name)) for d in (r / "val").iterdir()],
            "val has no class folders",
        ),
        (
            "folder",
            lambda r: [f.unlink() for f in (r / "val").rglob("*.JPEG")],
            "no images in its val part",
        ),
        (
            "shards",
            lambda r: [f.unlink() for f in r.glob("val*")],
            r"shards are of train; train-\*.tar and val-\*.tar",
        ),
        (
            "shards",
            lambda r: write_tar(r / "val-2.tar", [("a.cls", b"7"), ("a.jpg", b"")]),
            "labels 0 to 7, and num_classes=4",
        ),
        (
            "shards",
            lambda r: write_tar(r / "val-2.tar", [("a.jpg", b"")]),
            "val-2.tar: /a must have an image and a .cls",
        ),
        (
            "shards",
            lambda r: write_tar(r / "val-2.tar", [("a.cls", b"cat")]),
            "val-2.tar: no tar shard that can be read",
        ),
        (
            "shards",
            lambda r: (r / "val-2.tar").write_bytes(b"no tar" * 200),
            "val-2.tar: no tar shard that can be read",
        ),
        (
            "shards",
            lambda r: os.truncate(r / "val-000001.tar", 1700),
            "val-000001.tar.*fetch it anew",
        ),
        ("tables", lambda r: (r / "validation-0.parquet").unlink(), "no images in its val part"),
    ],
)
def test_data_that_are_not_whole_are_refused(
    form: str, spoil: Spoil, message: str, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(form)
    spoil(root)
    with pytest.raises(DataError, match=message) as caught:
        ImageNet(str(root), **SMALL).setup()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_classes": 1000}, "has 4 classes, and num_classes=1000 was asked for"),
        ({"holdout": 17}, "holdout=17 of 20 training images of 4 classes"),
        ({"batch_size": 21}, "batch_size=21 for 20 training images"),
        ({"root": "/no/such"}, "/no/such is not a folder; .* ImageNet-1k is ILSVRC/imagenet-1k"),
        ({"auto_augment": "rand-x9"}, "timm cannot make these transforms"),
        ({"interpolation": "cubic"}, "timm cannot make these transforms: .*cubic"),
        ({"crop_pct": 1.5}, "crop_pct=1.5: a share"),
        ({"workers": -1}, "workers=-1: 1 or more, and 0 or more"),
    ],
)
def test_arguments_that_do_not_go_with_the_data_are_refused(
    folder: Path, asked: dict, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ImageNet(**{"root": str(folder)} | SMALL | asked).train_dataloader()


class _Rows:
    """As much of a split of `datasets` as is used."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def cast_column(self, name: str, feature: Any) -> "_Rows":
        assert not feature.decode
        return self


def test_a_hub_data_set_is_indexed_by_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = ModuleType("datasets")
    library.Image = type(
        "Image", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)}
    )
    library.ClassLabel = type("ClassLabel", (), {"names": SORTED})
    features = {"image": library.Image(), "label": library.ClassLabel()}

    def load(name: str) -> dict[str, _Rows]:
        if name != "org/name":
            raise RuntimeError("no such data set\nand more")
        parts = {"train": images("train"), "validation": images("val")}
        return {
            split: _Rows(
                [{"image": {"bytes": b}, "label": SORTED.index(c)} for c, _, b in rows], features
            )
            for split, rows in parts.items()
        }

    library.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert same(epochs(ImageNet("org/name", **SMALL)), epochs(ImageNet(str(folder), **SMALL)))
    with pytest.raises(DataError, match=r"org/other: the library datasets gave: no such data set$"):
        ImageNet("org/other", **SMALL).setup()


def test_without_the_library_a_hub_data_set_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'xzoo\[data\]'"):
        ImageNet("org/name", **SMALL).setup()


class Probe(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shown = nn.Linear(3, 4), []  # type: ignore[var-annotated]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.shown.append(batch[0])
        return nn.functional.cross_entropy(self.layer(batch[0].mean((2, 3))), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: a module without one is warned of."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_with_a_worker_sees_the_batches_of_the_loader(
    folder: Path, tmp_path: Path
) -> None:
    probe = Probe()
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=str(tmp_path),
        limit_val_batches=0,
        **quiet,
    )
    trainer.fit(probe, datamodule=ImageNet(str(folder), **SMALL | {"workers": 1}))
    expected = epochs(ImageNet(str(folder), **SMALL))
    assert len(probe.shown) == 10
    for ours, (theirs, _) in zip(probe.shown, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
