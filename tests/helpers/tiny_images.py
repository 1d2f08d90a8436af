"""Small sets of images in the layouts of the real ones, and a recipe that trains on them in a second."""

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

RECIPE = {
    "seed_everything": 0,
    "model": {
        "class_path": "lightning_adam_mini.tasks.vision.ImageClassifier",
        "init_args": {"architecture": "timm/test_resnet"},
    },
    "data": {
        "class_path": "lightning_adam_mini.tasks.vision.data.ImageFolders",
        "init_args": {
            "root": "images",
            "batch_size": 4,
            "transforms": {"size": 16, "resize": 18, "crop": "resized", "policy": "randaugment", "erasing": 0.5},
        },
    },
    "optimizer": {"class_path": "lightning_adam_mini.factory.AdamMini", "init_args": {"lr": 1.0e-2}},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
}


def write_tree(root, counts, size=20):
    """`root/PART/CLASS/*.jpg`, as many as `counts[PART][CLASS]` says: noise in a colour of the class."""
    for part, classes in counts.items():
        for name, count in classes.items():
            draw = np.random.default_rng([len(part), *name.encode()])
            colour = np.random.default_rng([*name.encode()]).integers(0, 256, 3)
            folder = Path(root) / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = draw.integers(-40, 40, (size, size + 3, 3))
                pixels = (colour + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03}.jpg")


def write_idx(path, array):
    """An array of bytes in the IDX format, packed."""
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_fashion(folder, num_train=30, num_test=12):
    """The four files of Fashion-MNIST; images and labels of each part."""
    draw, parts = np.random.default_rng(0), {}
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        images, labels = draw.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
        parts[prefix] = images, labels
    return parts


def write_cifar10(root, monkeypatch, num=20):
    """The pickles of CIFAR-10, with their own checksums in place of those that torchvision knows; the pixels."""
    from torchvision.datasets import CIFAR10

    folder = Path(root) / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    draw, rows, sums = np.random.default_rng(0), {}, {}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        rows[name] = draw.integers(0, 256, (num, 3072)).astype(np.uint8)
        entry = {"data": rows[name], "labels": [index % 10 for index in range(num)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for path in folder.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    train = [[name, sums[name]] for name in rows if name != "test_batch"]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return rows


def write_image_recipe(folder):
    """`tiny.yaml` in a folder."""
    (Path(folder) / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), "utf-8")
