"""The language task by itself: building models, the loss, generation, and export without a trainer."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from lightning_adam_mini import factory
from lightning_adam_mini.schedule import Schedule
from lightning_adam_mini.tasks.llm import LanguageModel
from lightning_adam_mini.tasks.llm.model import build_config

CONFIG = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
CONFIG |= {"max_position_embeddings": 6}
LLAMA = {**CONFIG, "num_key_value_heads": 1, "intermediate_size": 12}


def built(config=CONFIG, **options):
    task = LanguageModel(config=config, **options)
    task.configure_model()
    return task.eval()


def batch():
    ids = torch.arange(14).reshape(2, 7) % 11
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}


def test_options_by_either_name():
    assert build_config("gpt2", {"n_embd": 8, "n_head": 2}).hidden_size == 8
    assert build_config("gpt2", {"hidden_size": 8, "num_attention_heads": 2}).n_embd == 8


def test_special_tokens_outside_of_a_small_vocabulary_are_dropped():
    assert build_config("gpt2", {"vocab_size": 100}).eos_token_id is None
    assert build_config("gpt2", {"vocab_size": 100, "eos_token_id": 3}).eos_token_id == 3
    assert build_config("gpt2", {}).eos_token_id == 50256


@pytest.mark.parametrize(
    ("architecture", "options", "told"),
    [
        ("gpt-2", {}, "no architecture 'gpt-2'; did you mean gpt2"),
        ("zzz", {}, "no architecture 'zzz', such as gpt2 or llama"),
        ("gpt2", {"n_embed": 8}, "GPT2Config has no option 'n_embed'; did you mean n_embd"),
        ("gpt2", {"n_embd": "8"}, "n_embd must be of type int, not '8'"),
        ("gpt2", {"hidden_size": 10, "num_attention_heads": 3}, "3 attention heads do not divide the width 10"),
        ("gpt2", {"n_head": 0}, "num_attention_heads must be at least 1, not 0"),
        ("llama", {**LLAMA, "num_attention_heads": 3}, "LlamaConfig rejects these options: The hidden size"),
        ("llama", {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 3}, "3 key-value heads do not divide"),
    ],
)
def test_refused_configurations(architecture, options, told):
    with pytest.raises(ValueError, match=told):
        LanguageModel(architecture=architecture, config=options)


@pytest.mark.parametrize(("architecture", "config"), [("gpt2", CONFIG), ("llama", LLAMA)])
def test_the_outline_is_the_network_without_memory(architecture, config):
    options = {"architecture": architecture, "config": config, "activation_checkpointing": True, "compile": True}
    task = LanguageModel(**options)
    assert task.configure_meta_model(SimpleNamespace()) == []
    real = built(config, architecture=architecture)
    assert {name: p.shape for name, p in task.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(parameter.is_meta for parameter in task.parameters())


def test_head_size_of_its_own():
    assert build_config("qwen3", {**LLAMA, "hidden_size": 10, "num_attention_heads": 4, "head_dim": 6}).head_dim == 6


@pytest.mark.parametrize("options", [{"sample_tokens": 0}, {"top_k": 0}, {"temperature": -0.1}])
def test_refused_sampling(options):
    with pytest.raises(ValueError, match="at least"):
        LanguageModel(config=CONFIG, **options)


def test_the_task_keeps_its_options_for_the_checkpoint():
    task = LanguageModel(factory.AdamW(lr=0.5), Schedule(floor=0.5), config=CONFIG, top_k=7)
    assert task.hparams["optimizer"] == factory.AdamW(lr=0.5)
    assert task.hparams["schedule"] == Schedule(floor=0.5)
    assert task.hparams["top_k"] == 7


@pytest.mark.parametrize(("architecture", "config"), [("gpt2", CONFIG), ("llama", LLAMA)])
def test_the_loss_is_that_of_transformers(architecture, config):
    task, data = built(config, architecture=architecture), batch()
    task.log = lambda *args, **kwargs: None
    loss = task.training_step(data, 0)
    own = task.network(input_ids=data["input_ids"]).logits
    expected = functional.cross_entropy(own.flatten(0, 1), data["labels"].flatten())
    assert torch.equal(loss, expected)
    # transformers shifts labels itself: give it the sequence as a whole.
    whole = torch.cat([data["input_ids"], data["labels"][:, -1:]], 1)[:, :6]
    theirs = task.network(input_ids=whole, labels=whole).loss
    assert torch.allclose(functional.cross_entropy(own[:, :5].flatten(0, 1), whole[:, 1:].flatten()), theirs)


def test_validation_weighs_tokens_and_not_batches():
    task, data = built(), batch()
    data["labels"][0, 1:] = -100
    nothing = {"input_ids": data["input_ids"], "labels": torch.full_like(data["labels"], -100)}
    with torch.no_grad():
        for part in (data, nothing, {name: tensor[1:] for name, tensor in data.items()}):
            task.validation_step(part, 0)
        logits = task(data["input_ids"])
    losses = functional.cross_entropy(logits.flatten(0, 1), data["labels"].flatten(), reduction="none").reshape(2, 6)
    labels = [losses[0, 0], *losses[1], *losses[1]]
    assert task.validation_loss().item() == pytest.approx(torch.stack(labels).mean().item(), rel=1e-6)
    task.on_validation_epoch_start()
    assert task.val_mean.count == 0


def test_a_second_call_of_configure_model_keeps_the_weights():
    task = built()
    network = task.network
    task.configure_model()
    assert task.network is network


def test_flops_take_the_width_of_attention():
    """With a head size of its own, attention is wider than the model."""
    config = {**LLAMA, "head_dim": 16}
    narrow, wide = built(LLAMA, architecture="llama"), built(config, architecture="llama")
    difference = wide.flops_per_unit(batch()) - narrow.flops_per_unit(batch())
    parameters = wide._active_parameters - narrow._active_parameters
    assert difference == pytest.approx(6 * parameters + 12 * 1 * (2 * 16 - 8) * 6)
    assert narrow.batch_units(batch()) == 12


def with_tokenizer(task):
    """A tokenizer of 11 words, where a trainer would have it."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(11)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = pytest.importorskip("transformers").PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w10", pad_token="w10"
    )
    task._trainer = SimpleNamespace(datamodule=SimpleNamespace(tokenizer=tokenizer), strategy=None)
    return task


def test_greedy_generation_takes_the_most_likely_token():
    task = with_tokenizer(built(temperature=0.0, sample_tokens=2))
    ids = torch.tensor([[1, 2], [3, 4]])
    expected = ids
    with torch.no_grad():
        for _ in range(2):
            expected = torch.cat([expected, task(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    told = [" ".join(f"w{token}" for token in row) for row in expected[:, 2:].tolist()]
    assert task.generate(ids) == [text.partition("w10")[0].strip() for text in told], "w10 ends a text"


def test_generation_stays_within_the_positions():
    task = with_tokenizer(built(sample_tokens=100))
    assert len(task.generate(torch.ones(1, 50, dtype=torch.int64))) == 1


def test_generation_needs_a_tokenizer():
    with pytest.raises(ValueError, match="generation needs a tokenizer"):
        built().generate(torch.ones(1, 2, dtype=torch.int64))


def test_export_without_a_tokenizer_and_after_a_failure(tmp_path, monkeypatch):
    task = built()
    monkeypatch.setattr(task.network, "save_pretrained", lambda folder: (folder.mkdir(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        task.export(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert task.export(str(tmp_path / "model")) == tmp_path / "model"
    with pytest.raises(ValueError, match="exists; choose another folder"):
        task.export(tmp_path / "model")
    again = LanguageModel(init_from=str(tmp_path / "model"))
    again.configure_model()
    for one, other in zip(task.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_validation_loss_that_is_not_a_number_shows():
    task, data = built(), batch()
    with torch.no_grad():
        task.validation_step(data, 0)
        task.network.get_output_embeddings().weight.fill_(float("nan"))
        task.validation_step(data, 0)
    assert task.validation_loss().isnan()
