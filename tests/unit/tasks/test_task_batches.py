"""What a batch counts where a task does not say, and data that a task cannot take."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from importlib import import_module
from inspect import isabstract

import pytest
import torch

pytest.importorskip("lightning.pytorch")

from lightning.pytorch import LightningDataModule

from imports import DOMAINS
from lightning_adam_mini.tasks.base import Task, num_samples

Pair = namedtuple("Pair", "x y")
FIVE = torch.zeros(5, 2)


@dataclass
class Record:
    name: str
    x: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (FIVE, 5),
        ([FIVE, torch.zeros(3)], 5),
        (Pair(FIVE, None), 5),
        ({"name": "p", "inputs": {"ids": FIVE}}, 5),
        (UserDict(input_ids=FIVE, attention_mask=FIVE), 5),
        (Record("r", FIVE), 5),
        ({"scale": torch.tensor(2.0), "x": FIVE}, 5),
        ({"text": ["a", "b", "c"]}, 3),
        (["a", "b"], 2),
        ("text", 1),
        (None, 1),
        (torch.tensor(1.0), 1),
        (torch.zeros(0, 2), 0),
    ],
)
def test_samples_of_a_batch(batch, samples):
    assert num_samples(batch) == samples
    assert Task().batch_units(batch) == samples


def test_samples_of_graphs():
    data = pytest.importorskip("torch_geometric.data")
    graph = data.Data(x=torch.zeros(4, 3), edge_index=torch.zeros(2, 6, dtype=torch.int64))
    assert num_samples(graph) == 4
    assert num_samples(data.Batch.from_data_list([graph, graph, graph])) == 3


def test_samples_of_a_tokenizer():
    encoding = pytest.importorskip("transformers").BatchEncoding({"input_ids": FIVE})
    assert num_samples(encoding) == 5


class Waves(LightningDataModule):
    batch_kind = "waves"


class OfWaves(Task):
    batch_kind = "waves"


class OfParticles(Task):
    batch_kind = "particles"


def test_data_that_a_task_takes():
    for data in (None, Waves(), LightningDataModule()):
        OfWaves().check_data(data)
        Task().check_data(data)
    with pytest.raises(ValueError, match=r"OfParticles takes particles, and Waves gives waves, or another --model"):
        OfParticles().check_data(Waves())


def domain_classes(domain, base):
    """Classes that a domain offers; a domain without its packages is skipped."""
    name = f"lightning_adam_mini.tasks.{domain}"
    try:
        modules = [import_module(name), import_module(f"{name}.data")]
    except ImportError as error:
        pytest.skip(f"{domain} needs {error.name}")
    offered = [getattr(module, name) for module in modules for name in module.__all__]
    return [cls for cls in offered if isinstance(cls, type) and issubclass(cls, base) and not isabstract(cls)]


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_each_domain_takes_its_own_data_and_no_other(domain):
    tasks = domain_classes(domain, Task)
    assert tasks
    for task in tasks:
        checking, taken = object.__new__(task), 0
        for other in sorted(DOMAINS):
            for module in domain_classes(other, LightningDataModule):
                given = object.__new__(module)
                if other == domain:
                    taken += 1
                    task.check_data(checking, given)
                else:
                    with pytest.raises(ValueError, match=rf"{task.__name__} takes .*; give --data \w+"):
                        task.check_data(checking, given)
        assert taken


@pytest.mark.parametrize(
    ("domain", "name", "given", "fixed"),
    [
        ("vision", "Mnist5k", "predict_path", "channels"),
        ("vision", "ImageFolders", "num_workers", "channels"),
        ("diffusion", "DigitImages", "val_images", "flip"),
        ("diffusion", "CelebA", "flip", "channels"),
    ],
)
def test_options_of_the_base_class_are_those_that_a_data_set_does_not_fix(domain, name, given, fixed):
    """On the command line, where the settings of loaders come from the signature of the base class."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(import_module(f"lightning_adam_mini.tasks.{domain}.data"), name), "data")
    options = parser.get_defaults().data
    assert given in options
    assert "kwargs" not in options
    assert fixed not in options
    with pytest.raises(jsonargparse.ArgumentError, match=fixed):
        parser.parse_args([f"--data.{fixed}=1"])
