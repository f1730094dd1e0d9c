"""Image tasks: what is read and refused, how it is divided, batches, augmentation."""

import gzip
import io
import itertools
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

import data
from data import image_batches, image_sets, images
from data.image_batches import Augmentation
from data.images import Images

SHARED = Path(__file__).parents[1] / "../shared/data"


def made_up(count=40, size=6, channels=1, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, size, size, channels)).astype(np.uint8)
    return Images(pixels, (np.arange(count) % classes).astype(np.int32))


def prepared(split=None, **options):
    split = made_up() if split is None else split
    given = {"classes": 4, "size": 6, "tokens": 10, "channels": split.pixels.shape[-1], **options}
    return image_batches.prepare(split, **given)


# ---------------------------------------------------------------------------- digits


def test_digits_come_with_the_package():
    task = data.load("digits")
    assert task.labels == tuple("0123456789")
    sizes = {split: len(rows.labels) for split, rows in task.splits.items()}
    assert sum(sizes.values()) == 1797 and list(sizes) == ["train", "dev", "test"]
    assert abs(sizes["test"] / 1797 - 0.2) < 0.03 and abs(sizes["dev"] / 1797 - 0.1) < 0.03
    train = task.splits["train"]
    assert train.pixels.shape[1:] == (8, 8, 1) and train.pixels.dtype == np.uint8
    assert train.pixels.min() == 0 and train.pixels.max() == 255
    assert len(np.unique(train.pixels)) == 17


def test_digits_keep_their_labels_and_order():
    from sklearn import datasets

    found = datasets.load_digits()
    whole = data.load("digits")
    by_pixels = {}
    for pixels, label in zip(found["images"], found["target"], strict=True):
        by_pixels[np.rint(pixels * 255 / 16).astype(np.uint8).tobytes()] = int(label)
    for rows in whole.splits.values():
        for pixels, label in zip(rows.pixels, rows.labels, strict=True):
            assert by_pixels[pixels.tobytes()] == label


def test_no_image_is_in_two_splits():
    task = data.load("digits")
    held = [{row.tobytes() for row in rows.pixels} for rows in task.splits.values()]
    assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]


def test_some_classes_are_divided_as_all_are():
    whole, some = data.load("digits"), data.load("digits", classes=("7", "3"))
    assert some.labels == ("7", "3")
    for split, rows in some.splits.items():
        old = whole.splits[split]
        for index, digit in enumerate((7, 3)):
            np.testing.assert_array_equal(
                rows.pixels[rows.labels == index], old.pixels[old.labels == digit]
            )


@pytest.mark.parametrize("classes", [("1", "x"), ("1", "1"), ("1",)])
def test_classes_are_checked(classes):
    with pytest.raises(ValueError, match=r"classes=\(|at least two"):
        data.load("digits", classes=classes)


def test_a_limited_task_has_all_labels():
    task = data.load("digits", examples=25)
    for rows in task.splits.values():
        assert sorted(np.bincount(rows.labels)) == [2] * 5 + [3] * 5
    again = data.load("digits", examples=25)
    np.testing.assert_array_equal(task.splits["dev"].pixels, again.splits["dev"].pixels)
    with pytest.raises(ValueError, match="limit=9 is smaller than the 10 labels"):
        data.load("digits", examples=9)


# ---------------------------------------------------------------------------- files


def write_idx(file, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def mnist_root(tmp_path):
    folder = tmp_path / image_sets.MNIST
    folder.mkdir()
    split = made_up(200, 5, classes=10)
    write_idx(folder / "t10k-images-idx3-ubyte.gz", split.pixels[..., 0])
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", split.labels.astype(np.uint8))
    return tmp_path, folder, split


def test_mnist_is_read_from_idx_files(mnist_root):
    root, folder, split = mnist_root
    task = data.load("mnist", root=root)
    assert sum(len(rows.labels) for rows in task.splits.values()) == 200
    known = {row.tobytes(): label for row, label in zip(*split, strict=True)}
    for rows in task.splits.values():
        assert all(known[p.tobytes()] == n for p, n in zip(*rows, strict=True))
    extra = made_up(100, 5, classes=10, seed=1)
    write_idx(folder / "train-images-idx3-ubyte.gz", extra.pixels[..., 0])
    write_idx(folder / "train-labels-idx1-ubyte.gz", extra.labels.astype(np.uint8))
    task = data.load("mnist", root=root)
    assert len(task.splits["test"].labels) == 200
    assert len(task.splits["train"].labels) + len(task.splits["dev"].labels) == 100


def test_spoilt_idx_files_are_refused(mnist_root):
    root, folder, split = mnist_root
    file = folder / "t10k-images-idx3-ubyte.gz"
    content = gzip.decompress(file.read_bytes())
    for spoilt, message in (
        (file.read_bytes()[:-20], "no complete gzip file"),
        (gzip.compress(content[:-1]), "holds 4999 bytes, its header says"),
        (gzip.compress(b"\x00\x00\x0d" + content[3:]), "no IDX file of bytes"),
    ):
        file.write_bytes(spoilt)
        with pytest.raises(ValueError, match=message):
            data.load("mnist", root=root)
    write_idx(file, split.pixels[:3, ..., 0])
    with pytest.raises(ValueError, match="they do not belong together"):
        data.load("mnist", root=root)
    file.unlink()
    with pytest.raises(ValueError, match="root=.*expected .*t10k-images"):
        data.load("mnist", root=root)


def jpeg(pixels):
    image = pytest.importorskip("PIL.Image", reason="the zip is of JPEG files")
    content = io.BytesIO()
    image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def write_zip(file, per_class=12):
    """Dark cats and light dogs."""
    rng = np.random.default_rng(0)
    classes = [
        (split, *kind) for split in ("test", "train") for kind in (("cat", 40), ("dog", 200))
    ]
    with zipfile.ZipFile(file, "w") as archive:
        for (split, name, value), index in itertools.product(classes, range(per_class)):
            grey = rng.integers(0, 30, (4, 4, 3)).astype(np.uint8) + np.uint8(value)
            archive.writestr(f"{split}/{name}/{index:04d}.jpg", jpeg(grey))


def test_cifar10_is_read_from_a_zip(tmp_path):
    folder = tmp_path / image_sets.CIFAR10
    folder.mkdir()
    with pytest.raises(ValueError, match="expected one zip in .*there are 0"):
        data.load("cifar10", root=tmp_path)
    write_zip(folder / "small.zip")
    task = data.load("cifar10", root=tmp_path)
    assert task.labels == ("cat", "dog")
    assert len(task.splits["test"].labels) == 24
    assert len(task.splits["train"].labels) + len(task.splits["dev"].labels) == 24
    for rows in task.splits.values():
        assert rows.pixels.shape[1:] == (4, 4, 3)
        np.testing.assert_array_equal(rows.pixels.mean((1, 2, 3)) > 128, rows.labels)
    with zipfile.ZipFile(folder / "small.zip", "a") as archive:
        archive.writestr("train/cat/9999.jpg", b"no image")
    with pytest.raises(ValueError, match="train/cat/9999.jpg is no readable image"):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "total", "shape", "labels"),
    [
        ("mnist", image_sets.MNIST, 10_000, (28, 28, 1), ("0", "9")),
        ("cifar10", image_sets.CIFAR10, 15_000, (32, 32, 3), ("airplane", "truck")),
    ],
)
def test_the_published_files(name, folder, total, shape, labels):
    if not (SHARED / folder).is_dir():
        pytest.skip(f"needs {folder} in ../shared/data")
    task = data.load(name, root=SHARED)
    assert (task.labels[0], task.labels[-1]) == labels
    assert sum(len(rows.labels) for rows in task.splits.values()) == total
    for rows in task.splits.values():
        assert rows.pixels.shape[1:] == shape
        assert np.bincount(rows.labels).min() > 0.06 * len(rows.labels)
    if name == "cifar10":
        assert (np.bincount(task.splits["test"].labels) == 1000).all()
    else:
        assert rows.pixels[0, 0].max() == 0  # the frame of every digit is black


# ---------------------------------------------------------------------------- the record


def test_a_division_depends_on_no_other_image():
    split = made_up(60)
    parts = images.divide(split, {"test": 0.3, "dev": 0.2})
    mixed = np.random.default_rng(1).permutation(60)[:50]
    again = images.divide(
        Images(split.pixels[mixed], split.labels[mixed]), {"test": 0.3, "dev": 0.2}
    )
    for name, rows in again.items():
        assert {r.tobytes() for r in rows.pixels} <= {r.tobytes() for r in parts[name].pixels}
    with pytest.raises(ValueError, match="a sum below 1"):
        images.divide(split, {"test": 0.6, "dev": 0.4})
    with pytest.raises(ValueError, match=r"leave \['dev'\] empty"):
        images.divide(made_up(3), {"dev": 1e-9})


def test_a_task_is_checked():
    pixels, labels = made_up()
    for splits, names, message in (
        ({}, "abcd", "is empty"),
        ({"train": (pixels, labels)}, "a", "at least two"),
        ({"train": (pixels, labels)}, "abca", "distinct"),
        ({"train": (pixels, labels)}, "abc", "reach from 0 to 3, outside 0..2"),
        ({"train": (pixels[..., 0], labels)}, "abcd", "pixels are uint8 of shape"),
        ({"train": (pixels.astype(float), labels)}, "abcd", "pixels are float64"),
        ({"train": (pixels, labels[:3])}, "abcd", r"40 images and labels of shape \(3,\)"),
        ({"train": (pixels[:0], labels[:0])}, "abcd", "0 images"),
        (
            {"train": (pixels, labels), "dev": (pixels[:, 1:], labels)},
            "abcd",
            "images of different shapes",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            data.make_image_task("toy", names, splits)


def test_resizing_keeps_constants_means_and_what_fits():
    flat = np.full((2, 6, 6, 3), 77, np.uint8)
    for size in (3, 6, 11):
        assert (images.resize(flat, size) == 77).all()
    split = made_up(2, 6).pixels
    np.testing.assert_array_equal(images.resize(split, 6), split)
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, None, :, None] * 20, (1, 8, 8, 1))
    small, large = images.resize(ramp, 4)[0, 1, :, 0], images.resize(ramp, 16)[0, 5, :, 0]
    np.testing.assert_array_equal(small[1:3], [50, 90])  # halfway between its two middle pixels
    np.testing.assert_array_equal(large[1:5], [5, 15, 25, 35])
    line = np.zeros((1, 8, 8, 1), np.uint8)
    line[:, :, 1] = 240  # the second of eight columns: in the middle of the first of four, nearly
    np.testing.assert_array_equal(images.resize(line, 4)[0, 1, :, 0], [103, 30, 0, 0])


# ---------------------------------------------------------------------------- batches


def test_a_batch_is_normalised_and_says_what_it_holds():
    rows = prepared(made_up(channels=3), mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 1.0))
    batches = image_batches.eval_batches(rows, batch_size=16)
    assert batches.steps_per_epoch == 3 and batches.shapes == ((16, 6, 6, 3),)
    last = batches[2]
    assert next(iter(last)) == "images"
    assert last["index"].tolist() == [*range(32, 40), *[-1] * 8]
    assert last["weight"].tolist() == [1.0] * 8 + [0.0] * 8
    assert last["mask"].shape == (16, 10) and last["mask"].all()
    expected = (rows.pixels[32:40] / 255 - [0.2, 0.4, 0.6]) / [0.5, 0.25, 1.0]
    np.testing.assert_allclose(last["images"][:8], expected, atol=1e-5)
    assert last["images"].dtype == np.float32
    np.testing.assert_array_equal(last["label"][:8], rows.labels[32:])


def test_training_batches_are_functions_of_seed_and_step():
    rows = prepared()
    options = {"batch_size": 12, "augmentation": Augmentation(2, True)}
    batches = image_batches.train_batches(rows, seed=3, **options)
    again = image_batches.train_batches(rows, seed=3, **options)
    other = image_batches.train_batches(rows, seed=4, **options)
    assert batches.steps_per_epoch == 3 and batches.dropped == 4
    for step in (0, 4, 31):
        np.testing.assert_array_equal(batches[step]["images"], again[step]["images"])
        assert np.abs(batches[step]["images"] - other[step]["images"]).max() > 0
    assert np.abs(batches[0]["images"] - batches[3]["images"]).max() > 0
    iterator = iter(batches)
    first = [next(iterator)["images"] for _ in range(4)]
    state = iterator.get_state()
    expected = next(iterator)["images"]
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)["images"], expected)
    np.testing.assert_array_equal(first[3], batches[3]["images"])


def test_every_epoch_has_an_order_and_every_step_an_augmentation_of_its_own():
    plain = image_batches.train_batches(prepared(), batch_size=40, seed=0)
    assert (plain[0]["label"] != plain[1]["label"]).any()
    same = Images(np.repeat(made_up(1).pixels, 40, axis=0), np.arange(40, dtype=np.int32) % 4)
    moved = image_batches.train_batches(
        prepared(same), batch_size=40, seed=0, augmentation=Augmentation(2)
    )
    assert np.abs(moved[0]["images"] - moved[1]["images"]).max() > 0


def test_an_epoch_holds_every_image_once():
    plain = image_batches.train_batches(prepared(), batch_size=10, seed=0)
    rows = prepared()
    whole = {((row / np.float32(255)) - np.float32(0.5)).tobytes() for row in rows.pixels}
    seen = [(row * np.float32(0.5)).tobytes() for step in range(4) for row in plain[step]["images"]]
    assert len(set(seen)) == 40 and set(seen) == whole


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_processes_share_a_batch(kind):
    rows, augmentation = prepared(), Augmentation(1, True)

    def make(**parts):
        if kind == "eval":
            return image_batches.eval_batches(rows, batch_size=16, **parts)
        return image_batches.train_batches(
            rows, batch_size=16, seed=1, augmentation=augmentation, **parts
        )

    whole = make()
    parts = [make(process_index=n, process_count=2) for n in range(2)]
    for name, array in whole[1].items():
        np.testing.assert_array_equal(np.concatenate([part[1][name] for part in parts]), array)
    assert parts[0].shapes == ((8, 6, 6, 1),)


def test_augmentation_moves_and_flips():
    pixels = made_up(300, 6).pixels
    moved = image_batches.augment(pixels, Augmentation(shift=2), np.random.default_rng(0))
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = set()
    for index, image in enumerate(moved):
        fits = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if (padded[index, top : top + 6, left : left + 6] == image).all()
        ]
        assert fits
        places.add(fits[0])
    assert len(places) == 25
    flipped = image_batches.augment(pixels, Augmentation(flip=True), np.random.default_rng(0))
    mirrored = (flipped == pixels[:, :, ::-1]).all((1, 2, 3))
    assert ((flipped == pixels).all((1, 2, 3)) ^ mirrored).all()
    assert 110 < mirrored.sum() < 190
    unchanged = image_batches.augment(pixels, Augmentation(), np.random.default_rng(0))
    np.testing.assert_array_equal(unchanged, pixels)


def test_images_take_the_models_size():
    rows = prepared(size=12)
    batch = image_batches.eval_batches(rows, batch_size=4)[0]
    assert batch["images"].shape == (4, 12, 12, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 3}, "the images have 1 channels, the model reads 3"),
        ({"mean": (0.1, 0.2)}, r"mean=\(0.1, 0.2\): give one number"),
        ({"std": 0.0}, "std=0.0 must be positive"),
    ],
)
def test_preparation_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        prepared(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 41}, "batch_size=41 must be from 1 to the 40 rows"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"balance": "even"}, "balance='even'"),
        ({"augmentation": Augmentation(6)}, "shift=6 must be from 0 to 5"),
        ({"process_count": 3}, "process_count=3 divide batch_size=8"),
    ],
)
def test_batches_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        image_batches.train_batches(prepared(), **{"batch_size": 8, "seed": 0, **options})


def test_an_evaluation_batch_is_checked():
    with pytest.raises(ValueError, match="batch_size=0"):
        image_batches.eval_batches(prepared(), batch_size=0)
