"""Every file below a folder: used as an image of a class and a part, or left out and why."""

import os
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xzoo.data.folders import part_of, read_folder
from xzoo.data.scan import read
from xzoo.errors import DataError


def draw(*files: Path) -> None:
    """A small image in each place, no two with the same bytes."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(draw.count).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        draw.count += 1


draw.count = 0


def classes(place: Path, names: tuple[str, ...] = ("ant", "bee"), each: int = 4) -> None:
    for name in names:
        draw(*(place / name / f"{i}.png" for i in range(each)))


def every_file(root: Path) -> set[str]:
    """What is there, found by another way: names of all files, and of links to folders that are not
    followed.
    """
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def used(layout, part: str) -> set[str]:
    return {name for name, _, _ in getattr(layout, part) or []}


def accounted(root: Path):
    """Read the folder; each of its files is used or left out, and none is both."""
    layout = read_folder(root)
    train, val, left = (
        used(layout, "train"),
        used(layout, "val"),
        [item.name for item in layout.left_out],
    )
    assert not train & val and not (train | val) & set(left) and len(left) == len(set(left))
    followed = {
        parent.as_posix() for name in train | val | set(left) for parent in Path(name).parents
    }
    assert every_file(root) - followed <= train | val | set(left)
    assert all(item.detail and "\n" not in item.detail for item in layout.left_out)
    return layout


USUAL = [
    ("train", "val"),
    ("Training", "Testing"),
    ("seg_train", "seg_test"),
    ("train_set", "test_set"),
    ("trainset", "testset"),
    ("training", "validation"),
    ("train_images", "val_images"),
    ("TRAIN", "VALID"),
    ("Train Data", "Eval Data"),
    ("train", "holdout"),
    ("train-2017", "val-2017"),
    ("training_set", "dev"),
    ("chest_xray_train", "chest_xray_test"),
]


@pytest.mark.parametrize(("train", "val"), USUAL)
@pytest.mark.parametrize("where", [".", "archive/photos", "twice"])
def test_usual_names_of_parts(tmp_path, train, val, where):
    places = {
        part: tmp_path / (f"{part}/{part}" if where == "twice" else f"{where}/{part}")
        for part in (train, val)
    }
    classes(places[train])
    classes(places[val], each=2)
    layout = accounted(tmp_path)
    assert layout.classes == ["ant", "bee"]
    assert len(layout.train) == 8 and all(
        train in name.split("/") for name in used(layout, "train")
    )
    assert len(layout.val) == 4 and all(val in name.split("/") for name in used(layout, "val"))


def test_what_is_no_name_of_a_part():
    for name in (
        "trains",
        "trainer",
        "bullet_train",
        "contest",
        "testudo",
        "value",
        "device",
        "evaluate me",
        "ant",
        "",
    ):
        assert part_of(name) is None, name


@pytest.mark.parametrize(
    "word",
    "seg segmented data dataset set split part images imgs pictures photos pics cropped final 1 2026".split(),
)
def test_long_names_are_read_at_once(word):
    """What a camera or a program makes of digits, and what people repeat: two readings a word would
    take for ever.
    """
    assert part_of(word * (200 // len(word))) is None
    assert part_of(word * 20 + "train" + word * 20) == "train"


def test_of_three_parts_the_test_is_not_used_and_told(tmp_path):
    for part in ("Train", "Valid", "Test"):
        classes(tmp_path / part)
    layout = accounted(tmp_path)
    assert used(layout, "val") == {f"Valid/{c}/{i}.png" for c in ("ant", "bee") for i in range(4)}
    assert layout.remarks == ["Test/ is not used, since Valid/ validates"]
    assert {item.why for item in layout.left_out if item.name.startswith("Test/")} == {
        "in folders that are not used"
    }
    assert sum(item.name.startswith("Test/") for item in layout.left_out) == 8


def test_a_stray_image_makes_no_class_of_a_part(tmp_path):
    classes(tmp_path / "train")
    classes(tmp_path / "val")
    draw(tmp_path / "train" / "overview.png", tmp_path / "cover.jpg")
    layout = accounted(tmp_path)
    assert layout.classes == ["ant", "bee"] and len(layout.train) == 8
    assert {(i.name, i.why) for i in layout.left_out} == {
        ("train/overview.png", "in no class folder"),
        ("cover.jpg", "in no class folder"),
    }


def test_a_locomotive_is_a_class(tmp_path):
    classes(tmp_path / "flat", ("bus", "car", "train"))
    assert accounted(tmp_path / "flat").classes == ["bus", "car", "train"]
    assert accounted(tmp_path / "flat").remarks == ["train/ is read as a class, beside bus, car"]
    # With images of its own and a sub-folder it is a class, too.
    classes(tmp_path / "mixed", ("bus", "car", "train"))
    draw(tmp_path / "mixed" / "train" / "steam" / "x.png")
    assert accounted(tmp_path / "mixed").classes == ["bus", "car", "train"]
    # With sub-folders alone nobody knows, and nothing is guessed.
    classes(tmp_path / "deep", ("bus", "car"))
    classes(tmp_path / "deep" / "train", ("steam", "diesel"))
    with pytest.raises(
        DataError, match=r"train/ may be a part, or a class as bus, car; .*another name"
    ):
        read_folder(tmp_path / "deep")


@pytest.mark.parametrize(
    "names",
    [("invalid", "valid"), ("dev", "prod"), ("ant", "bee", "val"), ("blurred", "broken", "valid")],
)
def test_a_flat_val_is_a_class(tmp_path, names):
    """Images to validate on need labels. So it was before parts could have other names."""
    classes(tmp_path, names)
    layout = accounted(tmp_path)
    assert (
        layout.classes == list(names) and layout.val is None and len(layout.train) == 4 * len(names)
    )
    (val,) = {"valid", "dev", "val"} & set(names)
    told = f"{val}/ is read as a class, beside {', '.join(name for name in names if name != val)}"
    assert layout.remarks == [told]
    # With a part that has classes to validate, it is a class beside those.
    classes(tmp_path / "test", names)
    layout = accounted(tmp_path)
    assert layout.classes == list(names) and len(layout.train) == len(layout.val) == 4 * len(names)
    # A test part without labels is what it is called.
    draw(tmp_path / "test1" / "0.png")
    with pytest.raises(DataError, match="test1/ may be a part"):
        read_folder(tmp_path)


def test_a_test_part_is_never_trained_on(tmp_path):
    """In the class folders, beside them, or alone with a train part that has no classes."""
    for name in ("ant", "bee"):
        classes(tmp_path / "inner" / name, ("train", "test"))
    layout = accounted(tmp_path / "inner")
    assert used(layout, "train") == {f"{c}/train/{i}.png" for c in ("ant", "bee") for i in range(4)}
    assert used(layout, "val") == {f"{c}/test/{i}.png" for c in ("ant", "bee") for i in range(4)}
    classes(tmp_path / "beside")
    classes(tmp_path / "beside" / "test", each=2)
    layout = accounted(tmp_path / "beside")
    assert layout.classes == ["ant", "bee"] and len(layout.train) == 8 and len(layout.val) == 4
    classes(tmp_path / "bare")
    draw(tmp_path / "bare" / "test1" / "0.jpg")
    with pytest.raises(DataError, match=r"test1/ may be a part, or a class as ant, bee"):
        read_folder(tmp_path / "bare")
    draw(tmp_path / "flat" / "train" / "0.jpg", tmp_path / "flat" / "test" / "0.jpg")
    with pytest.raises(DataError, match=r"train/ and test/: images lie in it directly"):
        read_folder(tmp_path / "flat")
    classes(tmp_path / "named", ("ant_train", "ant_test", "bee_train", "bee_test"))
    with pytest.raises(DataError, match=r"ant_test/ and ant_train/ may be parts of a class"):
        read_folder(tmp_path / "named")
    classes(tmp_path / "one", ("ant", "bee", "bee/test"))
    told = "read as images of the class, though called as a part: bee/test"
    assert told in accounted(tmp_path / "one").remarks
    classes(tmp_path / "two" / "a" / "train")
    classes(tmp_path / "two" / "a" / "test")
    classes(tmp_path / "two" / "b" / "train")
    classes(tmp_path / "two" / "b" / "test")
    with pytest.raises(DataError, match=r"a/ and b/ have parts; give one of them"):
        read_folder(tmp_path / "two")


def test_parts_beside_a_copy_and_leftovers(tmp_path):
    """Kaggle's chest_xray: the parts, the same folder once more, and what the archive left."""
    for place in (tmp_path, tmp_path / "chest_xray", tmp_path / "__MACOSX"):
        for part in ("train", "test", "val"):
            classes(place / part, each=2)
    layout = accounted(tmp_path)
    assert used(layout, "train") == {f"train/{c}/{i}.png" for c in ("ant", "bee") for i in range(2)}
    assert "beside train/, these folders are not used: chest_xray" in layout.remarks
    assert Counter(item.why for item in layout.left_out) == {
        "in folders that are not used": 12 + 4,
        "hidden or kept by a system": 12,
    }


KEPT = [
    *(
        "__MACOSX",
        "$RECYCLE.BIN",
        ".Trash-1000",
        ".thumbnails",
        "@eaDir",
        ".ipynb_checkpoints",
        ".cache",
        ".git",
    ),
    *(
        "lost+found",
        "System Volume Information",
        "#recycle",
        "RECYCLER",
        "found.000",
        ".AppleDouble",
    ),
]


@pytest.mark.parametrize("inside", ["", "ant/"])
def test_what_systems_keep_is_no_class_and_no_image(tmp_path, inside):
    classes(tmp_path)
    for name in KEPT:
        draw(tmp_path / f"{inside}{name}" / "bee" / "x.png")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        draw(tmp_path / "ant" / name)
    layout = accounted(tmp_path)
    assert layout.classes == ["ant", "bee"] and len(layout.train) == 8
    assert Counter(item.why for item in layout.left_out) == {
        "hidden or kept by a system": len(KEPT) + 4
    }
    assert not layout.remarks
    # What a user may well call so is the user's.
    classes(tmp_path / "own", ("trash", "thumbnails"))
    assert read_folder(tmp_path / "own").classes == ["thumbnails", "trash"]


def test_links_are_followed_once(tmp_path):
    root, other = tmp_path / "photos", tmp_path / "elsewhere"
    classes(root)
    draw(*(other / f"{i}.png" for i in range(6)))
    (root / "ant" / "more").symlink_to(other)
    (root / "self").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "bee" / "loop").symlink_to(root / "bee")
    (root / "ant" / "again.png").symlink_to("0.png")
    (root / "ant" / "gone.png").symlink_to("away.png")
    (root / "kitty").symlink_to(root / "ant")
    (root / "cow").symlink_to(other.parent / "cows")
    draw(tmp_path / "cows" / "1.png", tmp_path / "cows" / "2.png")
    layout = accounted(root)
    assert layout.classes == ["ant", "bee", "cow"]
    labels = Counter(label for _, label, _ in layout.train)
    assert labels == {0: 4 + 6 + 1, 1: 4, 2: 2}  # gone.png is named by whoever opens it
    assert {i.name for i in layout.left_out if i.why == "reached twice through links"} >= {
        *("self", "up", "bee/loop", "ant/again.png", "kitty/0.png"),
    }
    assert "no class, since all its files are another's, through links: kitty" in layout.remarks
    # A part made of links is one; its images are not those of the folder that they come from.
    for name in ("ant", "bee"):
        for part, numbers in (("train", (0, 1, 2)), ("val", (3,))):
            (tmp_path / "split" / part / name).mkdir(parents=True)
            for i in numbers:
                (tmp_path / "split" / part / name / f"{i}.png").symlink_to(root / name / f"{i}.png")
    layout = accounted(tmp_path / "split")
    assert len(layout.train) == 6 and len(layout.val) == 2


def test_many_links_to_each_other_end(tmp_path):
    names = [f"c{i:02d}" for i in range(12)]
    classes(tmp_path, tuple(names), each=2)
    for name in names:
        for other in names:
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    layout = accounted(tmp_path)
    assert layout.classes == names and len(layout.train) == 24


def test_only_regular_files_are_opened(tmp_path):
    classes(tmp_path)
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    os.mkfifo(tmp_path / "ant" / "pipe")
    (tmp_path / "ant" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "ant" / "link.png").symlink_to("pipe.png")
    place = os.getcwd()
    os.chdir(tmp_path / "ant")  # the path of a socket may be no longer than 108 bytes
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket.png")
    os.chdir(place)
    layout = accounted(tmp_path)
    assert {i.name: i.detail.partition(",")[0] for i in layout.left_out} == {
        "ant/pipe.png": "a named pipe",
        "ant/pipe": "a named pipe",
        "ant/link.png": "a named pipe",
        "ant/zero.png": "a device",
        "ant/socket.png": "a socket",
    }
    assert len(read(tmp_path).train) == 6


def test_endings(tmp_path):
    classes(tmp_path)
    draw(
        *(
            tmp_path / "ant" / name
            for name in ("UPPER.PNG", "wrong.jpg", "no_ending", "camera.cr2", "x.jpg_large")
        )
    )
    (tmp_path / "ant" / "README").write_text("BMW and RIFF are not images")
    (tmp_path / "ant" / "labels.csv").write_text("a,b")
    draw(tmp_path / "notes" / "a.txt")
    layout = accounted(tmp_path)
    assert {"ant/UPPER.PNG", "ant/wrong.jpg", "ant/no_ending"} < used(layout, "train")
    assert {i.name for i in layout.left_out if i.why == "not images"} == {
        *("ant/README", "ant/camera.cr2", "ant/labels.csv", "ant/x.jpg_large", "notes/a.txt"),
    }
    assert layout.remarks == ["no class, since there is no image in it: notes"]
    told = read(tmp_path).account()
    assert (
        told
        == "11 images of 2 classes; left out: 5 not images ((none), .cr2, .csv, .jpg_large, .txt)"
    )


def test_what_a_user_may_not_have_meant_is_told(tmp_path):
    classes(tmp_path, ("Cat", "cat", "dog/poodle", "dog/pug"))
    (tmp_path / "empty").mkdir()
    layout = accounted(tmp_path)
    assert layout.classes == ["Cat", "cat", "dog"]
    assert layout.remarks == [
        "no class, since there is no image in it: empty",
        "two classes, though only upper case tells them apart: Cat and cat",
        "sub-folders are of the class that they lie in: dog/poodle, dog/pug",
    ]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    """As another user sees it; who runs this may be one that can read everything."""
    classes(tmp_path, ("ant", "bee", "cow"))
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "cow":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(
        DataError, match="cow cannot be listed .Permission denied.; make it readable"
    ):
        read(tmp_path)


def test_the_order_of_images_is_that_of_before(tmp_path):
    """Fingerprints of runs that exist hang on it: files of a folder first, then its folders."""
    draw(
        *(
            tmp_path / name
            for name in ("a/z.png", "a/b/1.png", "a/b/c/2.png", "a/b.png", "a/B/3.png", "b/1.png")
        )
    )
    walked = [
        (Path(at) / file).relative_to(tmp_path).as_posix()
        for name in ("a", "b")
        for at, folders, files in os.walk(tmp_path / name)
        if folders.sort() is None
        for file in sorted(files)
    ]
    assert [name for name, _, _ in read_folder(tmp_path).train] == walked


def test_an_account_of_many_files_is_quick_to_make(tmp_path):
    """Nothing in it is quadratic: each file is listed a few times, and none is opened."""
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(1500):
            (tmp_path / name / f"{i}.png").touch()
    calls = Counter()

    def counted(path):
        calls[str(path)] += 1
        return scandir(path)

    scandir, os.scandir = os.scandir, counted
    try:
        assert len(accounted(tmp_path).train) == 3000
    finally:
        os.scandir = scandir
    assert max(calls.values()) <= 4
