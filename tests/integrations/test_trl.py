"""AdamMini in the trainers of TRL: each trains as with AdamW where the update is the same, and goes on exactly."""

import pytest
import torch

pytest.importorskip("trl")

import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from hugging_face import STEPS, arguments, difference, llama, optimizer_of, structures, weights, with_adapters
from lightning_adam_mini import AdamMini, annotate
from lightning_adam_mini.integrations.transformers import AdamMiniFactory

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

WORDS = ["red", "green", "blue", "one", "two", "three", "and", "or"]


def tokenizer():
    """A word a token, as large as the vocabulary of the tiny models."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def policy(**options):
    """A Llama that may see more tokens than the tiny one."""
    return llama(max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None, **options)


def judge():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=11, num_labels=1, max_position_embeddings=32, pad_token_id=0, **sizes)
    )


def rows(*columns):
    """Sixteen rows of other words in each column."""
    return Dataset.from_list(
        [
            {
                name: f" {WORDS[(row + 3 * shift) % 8]} {WORDS[(row * 5 + shift) % 8]}"
                for shift, name in enumerate(columns)
            }
            for row in range(16)
        ]
    )


def length(completions, **_):
    return [float(len(text)) for text in completions]


def sft(args, **given):
    return trl.SFTTrainer(policy(), args, train_dataset=rows("text"), processing_class=tokenizer(), **given)


def reward(args, **given):
    return trl.RewardTrainer(
        judge(), args, train_dataset=rows("chosen", "rejected"), processing_class=tokenizer(), **given
    )


def dpo(args, **given):
    data = rows("prompt", "chosen", "rejected")
    return trl.DPOTrainer(policy(), policy(), args, train_dataset=data, processing_class=tokenizer(), **given)


def grpo(args, **given):
    return trl.GRPOTrainer(
        policy(), length, args=args, train_dataset=rows("prompt"), processing_class=tokenizer(), **given
    )


TRAINERS = {
    "sft": (sft, trl.SFTConfig, {}),
    "reward": (reward, trl.RewardConfig, {}),
    "dpo": (dpo, trl.DPOConfig, {}),
    "grpo": (grpo, trl.GRPOConfig, {"num_generations": 2, "max_completion_length": 4}),
}
TAKES_IT = {"sft", "reward"}
"""Trainers whose constructor takes `optimizer_cls_and_kwargs`; others get it afterwards."""


def trainer_of(kind, folder, optimizer=None, **options):
    build, config, own = TRAINERS[kind]
    args = arguments(folder, config, bf16=False, gradient_checkpointing=False, **own, **options)
    if optimizer is None:
        return build(args)
    given = (AdamMiniFactory, {"args": args, **optimizer})
    if kind in TAKES_IT:
        return build(args, optimizer_cls_and_kwargs=given)
    trainer = build(args)
    trainer.optimizer_cls_and_kwargs = given
    return trainer


def trained(build, *given):
    """A trainer that has trained with the random numbers that its constructor seeds."""
    trainer = build(*given)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", TRAINERS)
def test_element_blocks_train_as_the_adamw_of_the_trainer(kind, tmp_path):
    adamw, ours = (trained(trainer_of, kind, tmp_path, optimizer) for optimizer in (None, {"partition": "element"}))
    assert type(optimizer_of(adamw)) is torch.optim.AdamW
    assert difference(weights(ours.model), weights(adamw.model)) < 1e-6
    assert difference(weights(ours.model), weights(trainer_of(kind, tmp_path).model)) > 1e-3


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_partition_is_that_of_the_model(kind, tmp_path):
    trainer = trainer_of(kind, tmp_path, {"partition": "factored"})
    trainer.create_optimizer()
    assert structures(optimizer_of(trainer)) == structures(AdamMini(trainer.model, partition="factored"))


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_run_that_is_resumed_is_one_that_was_not_stopped(kind, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, resumed = [trainer_of(kind, tmp_path, {"partition": "factored"}, **saving) for _ in range(2)]
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == STEPS
    assert difference(weights(resumed.model), weights(whole.model)) == 0


@pytest.mark.parametrize("how", ["class", "optimizers"])
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_other_ways_to_give_an_optimizer(kind, how, tmp_path):
    def otherwise():
        trainer = trainer_of(kind, tmp_path)
        args = trainer.args
        if how == "class":
            annotate(trainer.model, "factored")
            options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
            trainer.optimizer_cls_and_kwargs = (AdamMini, options)
        else:
            trainer.optimizer = AdamMiniFactory()(trainer.model, args, partition="factored")
        return trainer

    factory = trained(trainer_of, kind, tmp_path, {"partition": "factored"})
    assert difference(weights(trained(otherwise).model), weights(factory.model)) == 0


def test_adapters_that_the_trainer_makes(tmp_path):
    """From its `peft_config`, after the model was annotated."""
    peft = pytest.importorskip("peft")
    args = arguments(tmp_path, trl.SFTConfig, bf16=False, gradient_checkpointing=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    def weights_with(given, prepare=lambda model: model):
        torch.manual_seed(1)
        trainer = trl.SFTTrainer(
            prepare(policy()),
            args,
            train_dataset=rows("text"),
            processing_class=tokenizer(),
            peft_config=config,
            optimizer_cls_and_kwargs=given,
        )
        trainer.train()
        assert len(optimizer_of(trainer).state) == 4
        return weights(trainer.model)

    options = {"lr": args.learning_rate, "betas": (0.9, args.adam_beta2)}
    factory = weights_with((AdamMiniFactory, {"args": args, "partition": "factored"}))
    assert difference(weights_with((AdamMini, options), lambda model: annotate(model, "factored")), factory) == 0
    assert factory.keys() == weights(with_adapters(policy())).keys()
