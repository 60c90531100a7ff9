"""Every form of DATA, what a scan leaves out, and what it refuses."""

import hashlib
import io
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from xzoo.data.scan import identical, read, split_by_name
from xzoo.data.sources import Item, _from_rows
from xzoo.errors import DataError


def names(part) -> list[str]:
    return [item.name for item in part.items]


def png(color=(10, 200, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_digits_are_real_and_split_by_class():
    data = read("digits")
    assert data.classes == [str(d) for d in range(10)]
    assert len(data.train) + len(data.val) == 1797
    share = np.bincount(data.val.labels) / (
        np.bincount(data.val.labels) + np.bincount(data.train.labels)
    )
    assert np.abs(share - 0.2).max() < 0.01
    assert not data.mirror and data.in_memory and data.side == 8
    assert np.asarray(data.train.image(0)).max() == 255


def test_folder_of_classes(make_folder):
    root = make_folder(("10", "2", "ant"), each=10)
    (root / ".git").mkdir()
    shutil.copy(root / "2" / "00.png", root / ".git" / "x.png")
    shutil.copy(root / "2" / "00.png", root / "2" / "._00.png")
    (root / "2" / "notes.txt").write_text("no image")
    (root / "empty").mkdir()
    (root / "ant" / "deep" / "er").mkdir(parents=True)
    shutil.move(root / "ant" / "00.png", root / "ant" / "deep" / "er" / "z.JPG")
    data = read(root)
    assert data.classes == ["10", "2", "ant"]
    assert len(data.train) == 24 and len(data.val) == 6 and not data.skipped
    assert "ant/deep/er/z.JPG" in names(data.train) + names(data.val)
    assert np.bincount(data.val.labels).tolist() == [2, 2, 2]
    assert data.train.image(0).size == (28, 24)


def test_the_split_is_the_same_everywhere_and_keeps_one_for_training(make_folder, tmp_path):
    root = make_folder(each=10)
    first = names(read(root).val)
    shutil.copytree(root, tmp_path / "copy")
    assert names(read(tmp_path / "copy").val) == first
    # Pinned: a resumed run, and a comparison over machines, rely on it.
    assert first == ["ant/05.png", "ant/09.png", "bee/01.png", "bee/06.png"]
    for n, held in ((1, 0), (2, 1), (3, 1), (10, 2), (99, 20)):
        train, val = split_by_name([Item(f"{i}", 0, b"") for i in range(n)])
        assert (len(train), len(val)) == (n - held, held)


@pytest.mark.parametrize("val", ["val", "validation", "test", "Val"])
def test_folder_with_parts(make_folder, tmp_path, val):
    make_folder(each=6, where="all/train")
    make_folder(each=3, where=f"all/{val}", seed=1)
    data = read(tmp_path / "all")
    assert (len(data.train), len(data.val)) == (12, 6)
    assert data.classes == ["ant", "bee"] and names(data.val)[0] == f"{val}/ant/00.png"


def test_val_comes_before_test_and_parts_without_classes_are_told(make_folder, tmp_path):
    make_folder(each=6, where="all/train")
    make_folder(each=3, where="all/validation", seed=1)
    make_folder(("x",), each=1, where="all/test", seed=2)
    assert len(read(tmp_path / "all").val) == 6
    shutil.rmtree(tmp_path / "all" / "validation")
    shutil.move(tmp_path / "all" / "test" / "x" / "00.png", tmp_path / "all" / "test" / "00.png")
    data = read(tmp_path / "all")
    assert (len(data.train), len(data.val)) == (10, 2)
    assert data.remarks == ["test/ is not used: it has no class folders with images"]


def test_a_class_may_be_called_train(make_folder):
    root = make_folder(("car", "train"), each=4)
    assert read(root).classes == ["car", "train"]


def test_broken_files_are_left_out_by_name(make_folder):
    root = make_folder(each=10)
    (root / "ant" / "03.png").write_bytes((root / "ant" / "03.png").read_bytes()[:200])
    (root / "bee" / "heic.heic").write_bytes(b"\0\0\0\x18ftypheic")
    data = read(root)
    assert [name for name, _ in data.skipped] == ["ant/03.png", "bee/heic.heic"]
    assert len(data.train) + len(data.val) == 19


def test_data_that_cannot_be_used_says_why(make_folder, tmp_path):
    def told(data, match):
        with pytest.raises(DataError, match=match) as caught:
            read(data)
        assert "\n" not in str(caught.value)

    told(tmp_path / "gone" / "away", "does not exist; give a folder of images")
    told("nobody/nothing", r"pip install 'xzoo\[data\]'|the Hub gave")
    (tmp_path / "file.txt").write_text("x")
    told(tmp_path / "file.txt", "is a file")
    (tmp_path / "void").mkdir()
    told(tmp_path / "void", "no images in it")
    told(make_folder(("ant",), where="single"), r"one class only \(ant\)")
    flat = make_folder(("ant",), where="flat") / "ant"
    told(flat, "images lie in it directly")
    told(make_folder(each=1, where="few"), "one image in each class")

    broken = make_folder(where="broken")
    for file in broken.rglob("*.png"):
        file.write_bytes(b"x")
    told(broken, "none of its 24 images can be read; the first: ant/00.png")
    many = make_folder(where="many")
    for file in sorted(many.rglob("*.png"))[:4]:
        file.write_bytes(b"x")
    told(many, "4 of 24 images cannot be read, more than 3")
    lost = make_folder(("ant", "bee", "cow"), each=3, where="lost")
    for file in (lost / "cow").iterdir():
        file.write_bytes(b"x")
    told(lost, "no training image that can be read of cow")

    make_folder(("ant", "bee"), where="parts/train")
    make_folder(("bee", "cow"), where="parts/val")
    told(tmp_path / "parts", "only in train: ant; only in val: cow")


def test_what_does_not_fit_into_memory_is_decoded_when_asked_for(make_folder):
    root = make_folder()
    kept, lazy = read(root), read(root, memory=10_000)
    assert kept.in_memory and not lazy.in_memory
    assert kept.fingerprint() == lazy.fingerprint()
    for index in range(len(kept.train)):
        assert np.array_equal(
            np.asarray(kept.train.image(index)), np.asarray(lazy.train.image(index))
        )
    os.remove(lazy.train.items[0].source)
    with pytest.raises(DataError, match="could be read before"):
        lazy.train.image(0)


def test_fingerprint_follows_the_images(make_folder):
    root = make_folder()
    before = read(root).fingerprint()
    (root / "ant" / "00.png").rename(root / "ant" / "zz.png")
    assert read(root).fingerprint() != before


def test_the_split_of_before_where_no_files_are_identical():
    """As `split_by_name` was: the first fifth of the names by their hash."""

    def before(items, share=0.2):
        held = set()
        for label in sorted({item.label for item in items}):
            names = sorted(
                (i.name for i in items if i.label == label),
                key=lambda n: hashlib.sha256(n.encode()).digest(),
            )
            held.update(names[: min(max(1, round(share * len(names))), len(names) - 1)])
        return [i for i in items if i.name not in held], [i for i in items if i.name in held]

    for n in (1, 2, 3, 7, 50):
        items = [
            Item(f"{label}/{i}", label, b"%d" % i) for label in range(3) for i in range(n + label)
        ]
        assert split_by_name(items) == before(items)
        assert split_by_name(items, same=list(range(len(items)))) == before(items)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=60))
def test_identical_images_are_on_one_side(drawn):
    """Whatever they are: classes and contents drawn at random."""
    items = [
        Item(f"{label}/{i}", label, b"%03d" % content) for i, (label, content) in enumerate(drawn)
    ]
    same = identical(items)
    assert [items[first].source for first in same] == [item.source for item in items]
    train, val = split_by_name(items, same=same)
    assert sorted([*train, *val], key=items.index) == items
    assert not {item.source for item in train} & {item.source for item in val}
    # No class loses its last image to the validation.
    assert {item.label for item in train} == {item.label for item in items}


def test_copies_are_held_out_together_and_counted(make_folder):
    root = make_folder(each=10)
    for number in range(10):
        shutil.copy(root / "ant" / f"{number:02d}.png", root / "ant" / f"copy of {number}.png")
    shutil.copy(root / "bee" / "03.png", root / "ant" / "bee.png")
    data = read(root)
    sides = [
        {(root / name).read_bytes() for name in names(part)} for part in (data.train, data.val)
    ]
    assert not sides[0] & sides[1] and len(data.train) + len(data.val) == 31
    assert (
        data.account()
        == "31 images of 2 classes; 11 of them are copies of others, and on the same side as those"
    )
    assert data.remarks == [
        "2 images are identical to one of another class: ant/bee.png, bee/03.png"
    ]
    assert "bee/03.png" in names(data.train)


def test_what_validates_is_not_trained_on(make_folder, tmp_path):
    make_folder(each=6, where="all/train")
    make_folder(each=3, where="all/val", seed=1)
    shutil.copy(tmp_path / "all/val/ant/00.png", tmp_path / "all/train/ant/again.png")
    (tmp_path / "all/val/bee/link.png").symlink_to(tmp_path / "all/train/bee/04.png")
    data = read(tmp_path / "all")
    assert (len(data.train), len(data.val)) == (11, 7)
    assert [(left.name, left.why) for left in data.left_out] == [
        ("train/ant/again.png", "identical to images that validate"),
        ("train/bee/04.png", "identical to images that validate"),
    ]
    assert data.account() == "18 images of 2 classes; left out: 2 identical to images that validate"
    shutil.rmtree(tmp_path / "all/val")
    (tmp_path / "all/val").symlink_to("train")
    with pytest.raises(
        DataError,
        match=r"no training image .* of ant, bee \(13 are identical to images that validate",
    ):
        read(tmp_path / "all")


def test_only_files_that_may_be_identical_are_read_again(tmp_path, monkeypatch):
    contents = {f"size{n}": b"x" * (9000 + n) for n in range(20)} | {"copy": b"x" * 9000}
    contents |= {"end1": bytes(20000) + b"1", "end2": bytes(20000) + b"2"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    read_whole, digest = [], hashlib.file_digest
    monkeypatch.setattr(
        hashlib,
        "file_digest",
        lambda file, kind: read_whole.append(file.name) or digest(file, kind),
    )
    assert identical([Item(name, 0, tmp_path / name) for name in contents]) == [
        *range(20),
        0,
        21,
        22,
    ]
    assert sorted(read_whole) == [str(tmp_path / name) for name in ("copy", "size0")]


def test_ranges_are_those_of_the_folder_and_full_ones_change_no_fingerprint(make_folder):
    root = make_folder(each=5)

    def deepened(full: int) -> None:
        for number, file in enumerate(sorted(root.rglob("*.png"))):
            ramp = np.linspace(0, full / (1 + number), 24 * 28).reshape(24, 28)
            Image.fromarray(ramp.astype(np.uint16)).save(file)

    before = read(root).fingerprint()
    deepened(65535)
    whole = read(root)
    assert whole.ranges == {"16-bit": 65535.0} and whole.fingerprint() == before
    deepened(4095)
    data = read(root)
    assert data.ranges == {"16-bit": 4095.0} and data.fingerprint() != before
    for part in ("train", "val"):
        for index in range(len(getattr(data, part))):
            pair = [np.asarray(getattr(d, part).image(index)).astype(int) for d in (data, whole)]
            assert np.abs(pair[0] - pair[1]).max() <= 1
    lazy = read(root, memory=1000)
    assert np.array_equal(np.asarray(lazy.train.image(0)), np.asarray(data.train.image(0)))


def test_fingerprints_are_those_of_before(make_folder):
    # Renew only if runs that exist need not be resumed:
    # print(read(make_folder(each=10)).fingerprint())
    assert read(make_folder(each=10)).fingerprint() == "5711c027bd6ef1e6"


def test_warnings_without_a_name_are_none(make_folder):
    root = make_folder(each=5)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"
    with Image.open(root / "ant" / "00.png") as image:
        image.save(root / "ant" / "00.jpg", exif=exif)
        image.save(root / "ant" / "01.webp", exif=exif)
        image.save(root / "ant" / "00.png", exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = read(root)
    assert not caught and not data.skipped and len(data.train) + len(data.val) == 12


# ---- parquet


def test_a_parquet_file_beside_class_folders_is_not_the_data(make_folder):
    root = make_folder(each=5)
    write_parquet(root / ".cache" / "x.parquet", as_rows(4), [0, 1] * 2)
    assert len(read(root).train) == 8
    pq.write_table(pa.table({"file": ["a"], "words": ["b"]}), root / "metadata.parquet")
    assert (
        read(root).account()
        == "10 images of 2 classes; left out: 1 hidden or kept by a system, 1 not images (.parquet)"
    )
    write_parquet(root / "train.parquet", as_rows(20), [0, 1] * 10)
    data = read(root)
    assert data.classes == ["a", "b"] and len(data.train) == 16
    assert data.remarks == [
        "parquet files are read, and images in folders beside them are not: ant, bee",
        "no images in metadata.parquet",
    ]


@pytest.mark.parametrize(
    "test", ["testing-0.parquet", "my_test.parquet", "Testing/0.parquet", "dev.parquet"]
)
def test_a_test_part_in_parquet_is_not_trained_on(tmp_path, test):
    write_parquet(tmp_path / "training-0.parquet", as_rows(12)[:8], [0, 1] * 4)
    write_parquet(tmp_path / test, as_rows(12)[8:], [0, 1] * 2)
    data = read(tmp_path)
    assert (len(data.train), len(data.val)) == (8, 4)


@pytest.mark.parametrize(
    ("parts", "judge"),
    [
        (("dev", "test"), "dev"),
        (("dev", "val"), "val"),
        (("valid", "validation"), "validation"),
        (("holdout", "test"), "test"),
    ],
)
def test_which_part_validates_is_one_rule_for_folders_and_tables(
    make_folder, tmp_path, parts, judge
):
    make_folder(each=3, where="all/train")
    for seed, part in enumerate(parts, 1):
        make_folder(each=2, where=f"all/{part}", seed=seed)
    assert {name.partition("/")[0] for name in names(read(tmp_path / "all").val)} == {judge}
    rows = {part: [(f"{part}:{i}", b"", i) for i in range(2)] for part in ("train", *parts)}
    listing = _from_rows("data", rows, ["a", "b"])
    assert {item.name.partition(":")[0] for item in listing.val or []} == {judge}


def write_parquet(
    path: Path,
    rows: list,
    labels: list,
    image="image",
    label="label",
    large=False,
    classes=("a", "b"),
    plain=False,
) -> None:
    binary = pa.large_binary() if large else pa.binary()
    fields = (
        [("path", pa.string()), ("bytes", binary)]
        if large
        else [("bytes", binary), ("path", pa.string())]
    )
    kind = binary if plain else pa.struct(fields)
    label_type = pa.string() if isinstance(labels[0], str) else pa.int64()
    table = pa.table(
        {
            label: pa.array(labels, label_type),
            image: pa.array(rows, kind),
            "extra": pa.array([1.5] * len(rows)),
        }
    )
    if classes:
        features = {label: {"names": list(classes), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def as_rows(n: int) -> list:
    return [{"bytes": png((i, 0, 0)), "path": None} for i in range(n)]


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"image": "img", "label": "fine_label", "large": True},
        {"label": "labels"},
        {"plain": True},
        {"image": "picture", "label": "species"},
    ],
)
def test_parquet_in_the_forms_of_the_hub(tmp_path, form):
    rows = [r["bytes"] for r in as_rows(12)] if form.get("plain") else as_rows(12)
    rows, test = rows[:8], rows[8:]
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows, [0, 1] * 4, **form)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows, [0, 1] * 4, **form)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", test, [0, 1, 1, -1], **form)
    data = read(tmp_path)
    assert data.classes == ["a", "b"] and (len(data.train), len(data.val)) == (16, 3)
    assert data.train.image(3).getpixel((0, 0)) == (3, 0, 0)


def test_parquet_of_one_part_is_split_and_may_name_its_classes_itself(tmp_path):
    write_parquet(tmp_path / "all.parquet", as_rows(20), ["cat", "dog"] * 10, classes=None)
    data = read(tmp_path)
    assert data.classes == ["cat", "dog"] and (len(data.train), len(data.val)) == (16, 4)


def test_parquet_with_paths_secret_labels_and_broken_rows(tmp_path):
    Image.new("RGB", (5, 5)).save(tmp_path / "x.png")
    rows = [{"bytes": None, "path": "x.png"}, *as_rows(9), {"bytes": b"broken", "path": None}, None]
    write_parquet(tmp_path / "train.parquet", rows, [0, 1] * 6)
    write_parquet(tmp_path / "test.parquet", as_rows(3), [-1, -1, -1])
    data = read(tmp_path)
    assert len(data.train) + len(data.val) == 10
    assert [name for name, _ in data.skipped] == ["train.parquet:10", "train.parquet:11"]
    assert data.remarks == ["test is not used"]


def test_parquet_that_cannot_be_used_says_why(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="no parquet file that can be read"):
        read(tmp_path / "p")
    write_parquet(tmp_path / "q" / "train.parquet", as_rows(4), [0, 1, 2, 0])
    with pytest.raises(DataError, match="labels 2 are outside its 2 class names"):
        read(tmp_path / "q")
    (tmp_path / "r").mkdir()
    pq.write_table(pa.table({"text": ["a"], "words": ["b"]}), tmp_path / "r" / "train.parquet")
    with pytest.raises(DataError, match="no image column among text, words"):
        read(tmp_path / "r")


@pytest.mark.data
def test_real_sign_digits(real_data):
    data = read(real_data / "sign-digits")
    assert (len(data.train), len(data.val)) == (1653, 409) and data.classes == [
        str(d) for d in range(10)
    ]
    assert data.side == 100 and not data.skipped
