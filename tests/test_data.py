"""The data sets: splits, scaling, and one sentence for everything that cannot be trained on."""

import gzip
import io

import numpy as np
import pytest

from fbackprop import data
from fbackprop.data import DataError

ROWS = "1,2,0\n2,3.5,1\n" * 5


def test_digits_are_real_data_with_a_fixed_stratified_fifth_held_out():
    from sklearn.datasets import load_digits

    digits = data.digits()
    assert digits.x.shape == (1438, 64)
    assert digits.test_x.shape == (359, 64)
    assert digits.classes == 10
    assert digits.x.dtype == np.float32
    assert digits.x.min() == 0
    assert digits.x.max() == 1
    # Every example of scikit-learn's is in exactly one part, with its label.
    x, y = load_digits(return_X_y=True)
    given = sorted((*row, label) for row, label in zip(x / 16, y))
    found = [*zip(digits.x.tolist(), digits.y), *zip(digits.test_x.tolist(), digits.test_y)]
    np.testing.assert_array_equal(sorted((*row, label) for row, label in found), given)
    share = np.bincount(digits.test_y) / np.bincount(y)
    assert share.min() > 0.18
    assert share.max() < 0.22
    images = data.digits(images=True)
    assert images.images
    assert images.x.shape == (1438, 8, 8, 1)
    np.testing.assert_array_equal(images.x.reshape(-1, 64), digits.x)
    assert images.fingerprint != digits.fingerprint


@pytest.mark.parametrize("count", [5, 23, 100])
def test_the_split_is_a_partition_and_the_same_on_each_call(count):
    labels = np.random.default_rng(count).integers(0, 3, count)
    train, test = data.held_out_fifth(labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(count))
    assert len(test) == (count + 2) // 5
    np.testing.assert_array_equal(test, data.held_out_fifth(labels)[1])
    for label in range(3):
        assert abs(np.sum(labels[test] == label) - np.sum(labels == label) / 5) < 1


def test_inputs_are_scaled_by_the_training_part_alone():
    x = np.random.default_rng(0).normal(3, 7, (50, 4))
    x[:, 3] = 2.0  # a constant feature
    labels = np.arange(50) % 2
    source = data.classification("data", x, labels)
    np.testing.assert_allclose(source.x[:, :3].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(source.x[:, :3].std(0), 1, atol=1e-6)
    np.testing.assert_array_equal(source.x[:, 3], 0)
    train, _ = data.held_out_fifth(labels)
    np.testing.assert_allclose(
        source.test_x[:, 0].mean(), ((np.delete(x[:, 0], train) - x[train, 0].mean()) / x[train, 0].std()).mean(), rtol=1e-5
    )


@pytest.mark.parametrize("head", ["", "a,b,label\n", "0,1,label\n", "\ufeffa,b,label\r\n\r\n", '"width, in cm","height",y\n'])
def test_csv_with_and_without_a_line_of_names(tmp_path, head):
    (path := tmp_path / "data.csv").write_text(head + ROWS, encoding="utf-8", newline="")
    source = data.load(path)
    assert len(source.x) + len(source.test_x) == 10
    assert source.classes == 2
    assert source.x.shape[1] == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1.0,abc,0\n" + ROWS, "line 1, column 2 holds 'abc'"),
        ("1.0,2.0,abc\n" + ROWS, "line 1, column 3 holds 'abc'"),
        (ROWS + "1,,0\n", "line 11, column 2 holds nothing"),
        ("a,b,y\n" + ROWS + "1,0\n", "line 12 has 2 columns; expected 3, as in line 2"),
        ("", "no examples"),
        ("a,b,y\n", "no examples"),
        ("1\n2\n", "one column"),
        (ROWS + "1,nan,0\n", "x holds nan at [10, 1]"),
        (ROWS + "1,inf,0\n", "x holds inf"),
        (ROWS + "1,1e300,0\n", "scaled"),
        (ROWS + "1,2,0.5\n", "the labels hold 0.5"),
        (ROWS + "1,2,nan\n", "the labels hold nan"),
        (ROWS + "1,2,-1\n", "out of range"),
        (ROWS + "1,2,99\n", "out of range"),
        ("1,2,1\n" * 9, "every label is 1; expected at least two classes"),
        ("1,2,0\n2,3,1\n", "2 examples; expected at least 5"),
        (b"\xff\xfe\x00", "not a CSV file"),
    ],
)
def test_a_malformed_csv_gets_one_sentence(tmp_path, text, says):
    (path := tmp_path / "data.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        data.load(path)
    message = str(caught.value)
    assert says in message
    assert message.startswith(f"{path}: ")
    assert message.endswith(".")
    assert "\n" not in message


def npz(**arrays) -> bytes:
    np.savez(file := io.BytesIO(), **arrays)
    return file.getvalue()


X, Y = np.random.default_rng(0).normal(size=(20, 4, 3)), np.arange(20) % 3


@pytest.mark.parametrize(
    ("x", "shape"),
    [(X, (4, 3, 1)), (X[:, :, 0], (4,)), (X[..., None].repeat(3, -1), (4, 3, 3)), ((X > 0).astype(np.uint8), (4, 3, 1))],
)
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float64])
def test_npz(tmp_path, x, shape, dtype):
    (path := tmp_path / "data.npz").write_bytes(npz(x=x, y=Y.astype(dtype)))
    source = data.load(path)
    assert source.x.shape == (16, *shape)
    assert source.test_x.shape == (4, *shape)
    assert source.classes == 3
    assert source.y.dtype == np.int32
    assert source.x.dtype == np.float32


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (npz(x=X), "no array y; the file holds x"),
        (npz(), "the file holds nothing"),
        (npz(x=X[:, 0, 0], y=Y), "x has shape (20,)"),
        (npz(x=X[:, :0], y=Y), "x has shape (20, 0, 3)"),
        (npz(x=X, y=Y[:7]), "y has shape (7,); expected (20,)"),
        (npz(x=X, y=Y[:, None]), "y has shape (20, 1)"),
        (npz(x=X.astype(str), y=Y), "expected numbers"),
        (npz(x=X + 1j, y=Y), "complex128; expected numbers"),
        (npz(x=X.astype(object), y=Y), "Python objects"),
        (npz(x=np.where(X > 1, np.nan, X), y=Y), "x holds nan"),
        (npz(x=X, y=Y)[:300], "not an .npz file"),
        (b"", "not an .npz file"),
        (b"junk" * 40, "not an .npz file of plain arrays of numbers (it is no archive)"),
        (b"1,2,0\n", "not an .npz file"),
    ],
)
def test_a_malformed_npz_gets_one_sentence(tmp_path, content, says):
    (path := tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError) as caught:
        data.load(path)
    message = str(caught.value)
    assert says in message
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_paths_that_are_no_files(tmp_path):
    for path, says in [
        (tmp_path / "no.csv", "no such file"),
        (tmp_path / "data.txt", "expected .npz or .csv"),
        (tmp_path, "are not read"),
    ]:
        with pytest.raises(DataError, match=says):
            data.load(path)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DataError, match="folder"):
        data.load(tmp_path / "folder.npz")


def test_other_examples_have_another_fingerprint():
    one, two = (data.classification("data", X + shift, Y).fingerprint for shift in (0, 1e-9))
    assert one != two
    assert one == data.classification("other name", X, Y).fingerprint


# IDX


def idx(array, kind=8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


PIXELS = np.random.default_rng(1).integers(0, 256, (20, 4, 3), np.uint8)
LABELS = (np.arange(20) % 3).astype(np.uint8)


@pytest.mark.parametrize("names", [("a-images-idx3-ubyte", "a-labels-idx1-ubyte"), ("images.idx.gz", "labels.idx.gz")])
def test_idx(tmp_path, names):
    for name, array in zip(names, (PIXELS, LABELS)):
        content = idx(array)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert data.is_idx(names[0])
    source = data.load_idx(tmp_path / names[0])
    train, test = data.held_out_fifth(LABELS)
    assert source.images
    assert source.x.shape == (16, 4, 3, 1)
    assert source.classes == 3
    np.testing.assert_allclose(source.x[np.array([3, 1])], PIXELS[train][[3, 1], ..., None] / 255.0, rtol=1e-6)
    np.testing.assert_allclose(source.test_x[:2], PIXELS[test][:2, ..., None] / 255.0, rtol=1e-6)
    assert source.x[:1].dtype == np.float32
    np.testing.assert_array_equal(source.test_y, LABELS[test])
    mapped = source.x.pixels
    while isinstance(mapped, np.ndarray) and not isinstance(mapped, np.memmap):
        mapped = mapped.base
    assert isinstance(mapped, np.memmap) == (not names[0].endswith("gz"))
    (tmp_path / names[0]).write_bytes((gzip.compress if names[0].endswith("gz") else bytes)(idx(PIXELS ^ 1)))
    assert data.load_idx(tmp_path / names[0]).fingerprint != source.fingerprint


def test_idx_with_images_that_are_held_out(tmp_path):
    for part, count in (("train", 20), ("t10k", 6)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(PIXELS[:count]))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(LABELS[:count]))
    source = data.load_idx(tmp_path / "train-images-idx3-ubyte")
    assert (len(source.x), len(source.test_x), source.classes) == (20, 6, 3)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS[:6] + np.uint8(3)))
    with pytest.raises(DataError, match="the labels held out go up to 5; expected the 3 classes"):
        data.load_idx(tmp_path / "train-images-idx3-ubyte")


def test_idx_of_other_types_is_scaled(tmp_path):
    (tmp_path / "images.idx").write_bytes(idx(PIXELS.astype(">f4"), 13))
    (tmp_path / "labels.idx").write_bytes(idx(LABELS.astype(">i4"), 12))
    source = data.load_idx(tmp_path / "images.idx")
    assert abs(source.x.mean()) < 1e-5
    assert source.classes == 3


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (b"", idx(LABELS), "this is not an IDX file; it begins with nothing"),
        (b"PK\3\4....", idx(LABELS), "it begins with 50 4b 03 04"),
        (idx(PIXELS)[:-1], idx(LABELS), "there are 255 bytes; expected 256, for an array uint8 (20, 4, 3)"),
        (idx(PIXELS[0]), idx(LABELS), "the images have shape (4, 3)"),
        (idx(PIXELS), idx(LABELS[:7]), "the labels have shape (7,); expected (20,)"),
        (idx(PIXELS), idx(LABELS.astype(">f4"), 13), "the labels are >f4; expected integers"),
        (idx(PIXELS), idx(LABELS * 0), "every label is 0"),
        (idx(PIXELS), None, "labels.idx: there is no such file"),
    ],
)
def test_a_malformed_idx_gets_one_sentence(tmp_path, images, labels, says):
    (tmp_path / "images.idx").write_bytes(images)
    if labels is not None:
        (tmp_path / "labels.idx").write_bytes(labels)
    with pytest.raises(DataError) as caught:
        data.load_idx(tmp_path / "images.idx")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_idx_that_is_not_whole_or_has_another_name(tmp_path):
    (tmp_path / "images.idx.gz").write_bytes(gzip.compress(idx(PIXELS))[:-9])
    with pytest.raises(DataError, match="not compressed by gzip, or not whole"):
        data.load_idx(tmp_path / "images.idx.gz")
    with pytest.raises(DataError, match="the name has no 'images' in it"):
        data.load_idx(tmp_path / "train.idx")
    assert not data.is_idx("index.csv")
    assert data.is_idx("train-images-idx3-ubyte.gz")
