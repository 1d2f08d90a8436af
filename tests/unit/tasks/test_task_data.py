"""What the data of all tasks share: shuffling by running number, padding for ranks, images."""

import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from lightning_adam_mini.tasks.data.module import SampledDataModule
from lightning_adam_mini.tasks.data.sampling import PaddedItems, ShuffledSamples, ValidationSampler, collate_padded
from lightning_adam_mini.tasks.data.sources import find_images, read_image


class Noisy:
    """Items that add a random number, as augmentation does."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index + 0.9 * float(torch.rand(()))


class Plain(SampledDataModule):
    def __init__(self, items, **options):
        super().__init__(**options)
        self.items = items

    def train_dataloader(self):
        return self.train_loader(ShuffledSamples(self.items, seed=self.seed))


def test_each_item_comes_once_an_epoch_in_another_order():
    samples = ShuffledSamples(range(7), seed=0)
    epochs = [[samples[number] for number in range(7 * epoch, 7 * epoch + 7)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != [ShuffledSamples(range(7), seed=1)[number] for number in range(7)]


def test_what_an_item_draws_depends_on_its_number_alone():
    samples = ShuffledSamples(Noisy(5), seed=3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    forward = [samples[number] for number in range(12)]
    assert torch.equal(torch.get_rng_state(), before), "the model's own random numbers are left alone"
    torch.manual_seed(99)
    assert [samples[number] for number in reversed(range(12))] == forward[::-1]
    assert len({value % 1 for value in forward}) == 12


def test_a_loader_goes_on_after_any_batch():
    whole = [batch.tolist() for batch in Plain(Noisy(8), batch_size=3).train_dataloader()]
    data = Plain(Noisy(8), batch_size=3)
    loader = data.train_dataloader()
    first = next(iter(loader))
    resumed = Plain(Noisy(8), batch_size=3)
    resumed.load_state_dict(data.state_dict())
    assert [first.tolist(), next(iter(resumed.train_dataloader())).tolist()] == whole[:2]


def test_workers_draw_the_same():
    here, there = (Plain(Noisy(8), batch_size=4, num_workers=workers) for workers in (0, 2))
    assert [b.tolist() for b in here.train_dataloader()] == [b.tolist() for b in there.train_dataloader()]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_evaluate_each_item_once_in_as_many_batches(ranks):
    items = PaddedItems([(torch.full((2,), float(i)), i % 3) for i in range(7)])
    seen, batches = [], set()
    for rank in range(ranks):
        sampler = list(ValidationSampler(items, batch_size=3, num_replicas=ranks, rank=rank))
        chunks = [sampler[i : i + 3] for i in range(0, len(sampler), 3)]
        batches.add(len(chunks))
        for chunk in chunks:
            index, (images, labels) = collate_padded([items[i] for i in chunk])
            assert len(index) == len(images) == len(labels)
            assert images.shape[1:] == (2,)
            assert labels.dtype == torch.int64
            seen += index.tolist()
    assert sorted(seen) == list(range(7))
    assert len(batches) == 1


def test_a_batch_of_padding_alone_has_no_items_but_its_shapes():
    items = PaddedItems([{"image": torch.ones(1, 2, 2), "label": 4}])
    index, batch = collate_padded([items[5], items[6]])
    assert index.shape == (0,)
    assert batch["image"].shape == (0, 1, 2, 2)
    assert batch["label"].dtype == default_collate([4]).dtype


def test_empty_parts_are_told():
    with pytest.raises(ValueError, match="nothing to train on"):
        ShuffledSamples([], seed=0)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        PaddedItems([])


@pytest.mark.parametrize("option", ["batch_size", "num_workers", "seed"])
def test_numbers_out_of_range_are_told(option):
    with pytest.raises(ValueError, match=option):
        SampledDataModule(**{"batch_size": 1, option: -1})


def test_images_are_decoded_whole(tmp_path):
    Image.effect_noise((32, 24), 50).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").mode == "RGB"
    assert read_image(tmp_path / "a.jpg", "L").size == (32, 24)
    whole = (tmp_path / "a.jpg").read_bytes()
    for name, content in {"cut.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.png": b"no image"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"cannot read the image .*{name}.*replace the file"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="there is no image"):
        read_image(tmp_path / "missing.jpg")


def test_deep_images_are_refused(tmp_path):
    """Pillow would cut 16 bits off at 255, and show a white image."""
    Image.new("I;16", (4, 4), 40000).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png.*more than 8 bits"):
        read_image(tmp_path / "deep.png", "L")


def test_images_are_found_below_a_folder_but_no_hidden_files(tmp_path):
    for name in ("b.PNG", "a/c.jpg", "a/._c.jpg", ".hidden.png", ".thumbnails/a.jpg", "text.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == ["a/c.jpg", "b.PNG"]
