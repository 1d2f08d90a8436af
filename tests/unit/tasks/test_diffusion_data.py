"""Images for diffusion models: the embedded digits, folders, CelebA's layout, and what is wrong with each."""

import os
import sys

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from PIL import Image

from lightning_adam_mini.tasks.data.sources import find_images
from lightning_adam_mini.tasks.diffusion.data import CelebA, DigitImages, ImageFiles, sources

FACES = 12
OFFICIAL = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LIGHTNING_ADAM_MINI_CACHE", str(tmp_path_factory.mktemp("cache")))


def ready(data, stage="fit"):
    data.prepare_data()
    data.setup(stage)
    return data


def batches(loader):
    return list(loader)


def write_images(folder, number=10, size=(12, 10), suffix=".png"):
    """Images of one colour each, in two folders."""
    for index in range(number):
        path = folder / ("a" if index % 2 else "b/c") / f"{index}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (20 * index, 0, 255)).save(path)
    return folder


def write_celeba(root, *, annotations=True, number=FACES):
    """CelebA as torchvision unpacks it, with fewer images."""
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    names = [f"{index + 1:06d}.jpg" for index in range(number)]
    for index, name in enumerate(names):
        Image.new("RGB", (178, 218), (20 * index, 100, 50)).save(folder / name)
    if annotations:
        rows = [f"{name} {part}\n" for name, part in zip(names, OFFICIAL, strict=False)]
        (root / "celeba" / "list_eval_partition.txt").write_text("".join(rows))
        attributes = [f"{number}\n", "5_o_Clock_Shadow Arched_Eyebrows Young \n", *(f"{n} -1  1 -1\n" for n in names)]
        (root / "celeba" / "list_attr_celeba.txt").write_text("".join(attributes))
    return root


def test_digits_are_split_for_good():
    data = ready(DigitImages(batch_size=64, seed=3))
    train, val = (data.real_images(part, 10**6) for part in ("train", "val"))
    assert (train.shape, val.shape) == ((1527, 1, 8, 8), (270, 1, 8, 8))
    assert (train.min(), train.max(), train.dtype) == (-1, 1, torch.float32)
    assert torch.equal(val, ready(DigitImages(seed=4)).real_images("val", 10**6))
    known = {tuple(image.flatten().tolist()) for image in train}
    assert not any(tuple(image.flatten().tolist()) in known for image in val)


def test_batches_of_digits():
    data = ready(DigitImages(batch_size=100, val_images=130))
    batch = next(iter(data.train_dataloader()))
    assert (batch.shape, batch.dtype) == ((100, 1, 8, 8), torch.float32)
    indices, images = zip(*batches(data.val_dataloader()), strict=True)
    assert torch.cat(indices).tolist() == list(range(130))
    assert torch.equal(torch.cat(images), data.real_images("val", 130))
    assert sum(len(each) for each, _ in batches(data.test_dataloader())) == 270


def test_seeds_of_new_images_need_no_data(tmp_path):
    data = ready(ImageFiles(str(tmp_path / "nowhere"), num_images=5, image_seed=7, batch_size=2), "predict")
    assert torch.cat([seeds for _, seeds in batches(data.predict_dataloader())]).tolist() == [7, 8, 9, 10, 11]


def test_folders_are_read_to_the_bottom(tmp_path):
    write_images(tmp_path)
    (tmp_path / "a" / "._1.png").write_bytes(b"written by macOS")
    (tmp_path / "readme.txt").write_text("no image")
    data = ready(ImageFiles(str(tmp_path), image_size=8, val_fraction=0.3, check_files=True, batch_size=4))
    images = torch.cat([data.real_images(part, 99) for part in ("train", "val")])
    assert images.shape == (10, 3, 8, 8)
    reds = sorted(round(float(red + 1) * 127.5) for red in images[:, 0, 0, 0])
    assert reds == [20 * index for index in range(10)]
    assert (images[:, 1] == -1).all()
    assert (images[:, 2] == 1).all()
    assert len(data.real_images("val", 99)) == 3


def test_the_split_stays_where_files_are_added(tmp_path):
    write_images(tmp_path, number=12)
    before = ready(ImageFiles(str(tmp_path), image_size=8, val_fraction=0.25))._opened.val.paths
    Image.new("RGB", (12, 10)).save(tmp_path / "0.png")  # sorted first
    assert find_images(tmp_path)[0] == tmp_path / "0.png"
    after = ready(ImageFiles(str(tmp_path), image_size=8, val_fraction=0.25))._opened.val.paths
    assert len(before) == len(after) == 3
    assert len(set(before) & set(after)) >= 2
    assert set(before) - {*find_images(tmp_path)[:3], *find_images(tmp_path)[-3:]}, "not by their order"


def test_the_middle_is_cropped_and_scaled(tmp_path):
    image = Image.new("L", (40, 20), 0)
    image.paste(255, (8, 0, 32, 20))  # smoothing reaches two pixels far
    for name in ("1.png", "2.png"):
        image.save(tmp_path / name)
    whole = ImageFiles(str(tmp_path), image_size=10, channels=1, flip=False)
    assert (ready(whole).real_images("train", 1) == 1).all(), "the middle 20 x 20"
    image.paste(255, (0, 0, 40, 20))
    image.paste(0, (15, 5, 25, 15))
    for name in ("1.png", "2.png"):
        image.save(tmp_path / name)
    cropped = ImageFiles(str(tmp_path), image_size=10, channels=1, crop=10)
    assert (ready(cropped).real_images("train", 1) == -1).all(), "the middle 10 x 10"


def test_half_of_the_training_images_are_mirrored_and_no_others(tmp_path):
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 4, 8))
    for index in range(60):
        image.save(tmp_path / f"{index}.png")
    for flip in (True, False):
        data = ready(ImageFiles(str(tmp_path), image_size=8, channels=1, flip=flip, batch_size=10))
        first = torch.cat(batches(data.train_dataloader()))[:, 0, 0, 0]
        assert (15 < (first == -1).sum() < 35) if flip else (first == 1).all()
        assert all((images[:, 0, 0, 0] == 1).all() for _, images in batches(data.val_dataloader()))


@pytest.mark.parametrize("damage", [b"", b"no image at all", None])
def test_a_damaged_image_is_named(tmp_path, damage):
    write_images(tmp_path, suffix=".jpg")
    victim = tmp_path / "a" / "3.jpg"
    victim.write_bytes(victim.read_bytes()[:-200] if damage is None else damage)
    with pytest.raises(ValueError, match=r"cannot read the image .*a/3\.jpg"):
        ready(ImageFiles(str(tmp_path), image_size=8, check_files=True))
    data = ready(ImageFiles(str(tmp_path), image_size=8))
    with pytest.raises(ValueError, match=r"cannot read the image .*a/3\.jpg"):
        data.real_images("train", 99), data.real_images("val", 99)


def test_files_are_checked_once(tmp_path, monkeypatch):
    """For training alone, and again where a file or what is asked of it has changed."""
    paths = find_images(write_images(tmp_path))
    for path in paths:
        os.utime(path, (1e9, 1e9))  # a file that has just been written may change within its time stamp
    read, read_image = [], sources.read_image
    monkeypatch.setattr(sources, "read_image", lambda path, mode: read.append(path) or read_image(path, mode))

    def reads(stage, **options):
        read.clear()
        ready(ImageFiles(str(tmp_path), image_size=8, check_files=True, **options), stage)
        return len(read)

    assert [reads(stage) for stage in ("validate", "test", "predict")] == [1, 1, 0]
    assert [reads("fit"), reads("fit")] == [1 + len(paths), 1]
    assert [reads("fit", crop=5), reads("fit", crop=5)] == [1 + len(paths), 1]
    assert reads("fit", channels=1) == 1 + len(paths)
    os.utime(paths[3], (2e8, 2e8))
    assert reads("fit") == 1 + len(paths)
    paths[3].write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"cannot read the image {paths[3]}"):
            reads("fit")


def test_all_files_are_checked_for_the_crop(tmp_path):
    write_images(tmp_path)
    Image.new("RGB", (9, 10)).save(tmp_path / "z.png")
    told = r"z\.png has 9 x 10 pixels, fewer than the crop of 10: lower `crop`"
    with pytest.raises(ValueError, match=told):
        ready(ImageFiles(str(tmp_path), image_size=8, crop=10, check_files=True))
    ready(ImageFiles(str(tmp_path), image_size=8, crop=9, check_files=True))


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_crop_that_is_too_large_is_told_at_setup(tmp_path, stage):
    write_images(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"\.png has 12 x 10 pixels, fewer than the crop of 11: lower `crop`"):
        ready(ImageFiles(str(tmp_path / "folder"), image_size=8, crop=11), stage)
    faces = write_celeba(tmp_path)
    with pytest.raises(ValueError, match=r"\.jpg has 178 x 218 pixels, fewer than the crop of 200: lower `crop`"):
        ready(CelebA(str(faces), crop=200), stage)
    ready(CelebA(str(faces), crop=200), "predict")


@pytest.mark.parametrize(("package", "called"), [("sklearn", "scikit-learn"), ("torchvision", "torchvision")])
def test_a_missing_package_is_told(tmp_path, monkeypatch, package, called):
    data = DigitImages() if package == "sklearn" else ImageFiles(str(write_images(tmp_path)))
    monkeypatch.setitem(sys.modules, package, None)
    told = rf"needs the package {called}; install it with pip install 'lightning-adam-mini\[diffusion\]'$"
    with pytest.raises(ValueError, match=told):
        ready(data)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"path": "nowhere"}, "there is no folder nowhere"),
        ({"path": "empty"}, "empty contains 0 images .* at least 2 are needed"),
        ({"crop": 11}, r"has 12 x 10 pixels, fewer than the crop of 11: lower `crop`"),
        ({"crop": 0}, "`crop` must be at least 1"),
        ({"val_fraction": 0.0}, "`val_fraction` must lie between 0 and 1"),
        ({"image_size": 0}, "`image_size` must be at least 1, got 0"),
        ({"num_images": 0}, "`num_images` must be at least 1, got 0"),
        ({"val_images": 0}, "`val_images` must be at least 1, got 0"),
        ({"image_seed": -1}, "`image_seed` must be at least 0, got -1"),
        ({"channels": 2}, "`channels` must be 3 for colour or 1 for grey, got 2"),
    ],
)
def test_refused_folders_and_options(tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "images")
    with pytest.raises(ValueError, match=told):
        ready(ImageFiles(**{"path": "images", "image_size": 8, "check_files": True} | options))


def test_celeba_keeps_the_official_parts(tmp_path):
    data = ready(CelebA(str(write_celeba(tmp_path)), image_size=16, num_workers=0, batch_size=4))
    sizes = [len(data.real_images(part, 99)) for part in ("train", "val", "test")]
    assert sizes == [OFFICIAL.count(part) for part in range(3)]
    assert [path.name for path in data._opened.val.paths] == ["000008.jpg", "000009.jpg", "000010.jpg"]
    assert data.real_images("test", 99).shape == (2, 3, 16, 16)
    inner = ready(CelebA(str(tmp_path / "celeba" / "img_align_celeba"), num_workers=0))
    assert inner._opened.val.paths == data._opened.val.paths


def test_faces_without_annotations_get_a_fixed_part(tmp_path, caplog):
    write_celeba(tmp_path, annotations=False)
    with caplog.at_level("INFO"):
        data = ready(CelebA(str(tmp_path), num_workers=0))
    assert caplog.text.count("no list_eval_partition.txt: 11 images for training, 1 for validation, by hash") == 1
    assert data._opened.val.paths == ready(CelebA(str(tmp_path), num_workers=0))._opened.val.paths


def edit(name, old, new):
    def change(root):
        path = root / "celeba" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


PARTITION, ATTRIBUTES = "list_eval_partition.txt", "list_attr_celeba.txt"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (edit(PARTITION, "000004.jpg 0\n", ""), rf"{PARTITION} lists 11 images, but there are 12 in the folder"),
        (edit(PARTITION, "000004.jpg 0", "000099.jpg 0"), r"000004\.jpg: the file does not list it"),
        (edit(PARTITION, "000004.jpg 0", "000004.jpg 3"), rf"{PARTITION}, line 4: '000004\.jpg 3' is not .* 0, 1 or 2"),
        (edit(PARTITION, "000004.jpg 0", "000004.jpg"), rf"{PARTITION}, line 4: '000004\.jpg' is not an image and"),
        (edit(PARTITION, ".jpg 1", ".jpg 0"), r"10 images for training \(0\) and 0 for validation \(1\)"),
        (
            edit(ATTRIBUTES, "000012.jpg -1  1 -1\n", ""),
            rf"{ATTRIBUTES}: its first line says 12 images, but 11 follow",
        ),
        (edit(ATTRIBUTES, "12\n5", "twelve\n5"), rf"{ATTRIBUTES}: it must begin with the number of images"),
        (edit(ATTRIBUTES, "000012.jpg -1  1 -1", "000012.jpg -1  1"), r"line 14: 2 values for 3 attributes"),
        (lambda root: (root / "celeba/img_align_celeba/000002.jpg").unlink(), "lists 12 images, but there are 11"),
    ],
)
def test_annotations_of_other_images_are_refused(tmp_path, change, told):
    change(write_celeba(tmp_path))
    with pytest.raises(ValueError, match=told):
        ready(CelebA(str(tmp_path), num_workers=0))


def test_missing_faces_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*celeba/img_align_celeba: unpack img_align_celeba\.zip"):
        ready(CelebA(str(tmp_path), num_workers=0))
    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"img_align_celeba contains 0 images"):
        ready(CelebA(str(tmp_path), num_workers=0))


def test_torchvision_reads_the_same_layout(tmp_path):
    """Names and parts are torchvision's, its check of md5 sums aside."""
    write_celeba(tmp_path)
    for name in ("identity_CelebA.txt", "list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        head = "" if name.startswith("identity") else f"{FACES}\nheader\n"
        rows = "".join(f"{index + 1:06d}.jpg 1\n" for index in range(FACES))
        (tmp_path / "celeba" / name).write_text(head + rows)
    datasets = pytest.importorskip("torchvision.datasets")
    theirs = type("Unchecked", (datasets.CelebA,), {"_check_integrity": lambda _: True})
    ours = ready(CelebA(str(tmp_path), num_workers=0))._opened
    for split, images in {"train": ours.train, "valid": ours.val, "test": ours.test}.items():
        assert theirs(str(tmp_path), split=split).filename == [path.name for path in images.paths]
