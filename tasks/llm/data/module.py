"""The base of data modules of tokens: windows, loaders, resuming. Subclasses open the tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from ...data.cache import default_cache_dir
from ...data.module import TOKENIZER, SampledDataModule
from .tokenizer import keep_tokenizer, load_tokenizer, tokenizer_texts, tokenizers_differ
from .tokens import TokenStream, TrainWindows, ValidationWindows, collate_windows, hash_tokens, unigram_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """The tokens of a subclass.

    Args:
        train: Training tokens.
        val: Validation tokens.
        vocab_size: Every token is below it.
        tokenizer: The tokenizer's file or folder, if there is one. Loaded when it is first needed.
        val_bytes: UTF-8 bytes of the text of the validation tokens, if known.
    """

    train: TokenStream
    val: TokenStream
    vocab_size: int
    tokenizer: str | None = None
    val_bytes: int | None = None


class TokenDataModule(SampledDataModule, ABC):
    """Batches of token windows for training, validation and generation.

    A batch is ``{"input_ids": (B, T), "labels": (B, T)}``, int64, with the labels already shifted by one and -100 where
    no token follows. Training windows start at random positions, drawn with replacement; the windows of a step depend
    on ``seed`` and on the global batch (``batch_size`` times ranks, times accumulation) alone. A resumed run continues
    with the next samples.

    Validation reads consecutive windows, each on one rank. Ranks that run out get a batch whose labels are all -100,
    so the loss must be summed over tokens and divided by the number of labels that are not -100, over all batches.

    Args:
        context_length: Tokens in a sequence, T.
        batch_size: Sequences in a batch of one rank, B.
        num_workers: Processes that read ahead, for each loader; 0 reads in the training process.
        val_tokens: Tokens that one evaluation predicts, over all ranks, in windows spread evenly over the validation
            part; all of it by default. The result does not depend on the number of ranks.
        epoch_samples: Sequences in an epoch, over all ranks. By default the number of windows without overlap in the
            training part.
        seed: Determines the training windows, and nothing else.
        prompts: Texts that `predict` continues, one batch each. With several ranks, each rank continues all of them.
        cache_dir: Folder for prepared tokens and tokenizers. By default `$LIGHTNING_ADAM_MINI_CACHE`, else
            `$XDG_CACHE_HOME/lightning-adam-mini`, else `~/.cache/lightning-adam-mini`.

    Raises:
        ValueError: If a number is out of range.
    """

    batch_kind = "token windows"
    other_data = (
        "set data.tokenizer to null to use the run's, or to the folder `tokenizer` of the run; other tokens need "
        "a new run"
    )
    tokenizer_spec: str | None = None
    """The tokenizer that the user gave."""
    wanted_vocab_size: int | None = None
    """The vocabulary size that the user gave."""
    default_prompts: tuple[str, ...] = ("The", "In the beginning", "Once upon a time")

    def __init__(
        self,
        *,
        context_length: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        val_tokens: int | None = None,
        epoch_samples: int | None = None,
        seed: int = 0,
        prompts: list[str] | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        counts = {"context_length": context_length, "val_tokens": val_tokens, "epoch_samples": epoch_samples}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.context_length = context_length
        self.val_tokens = val_tokens
        self.epoch_samples = epoch_samples
        self.prompts = list(self.default_prompts if prompts is None else prompts)
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._source: TokenSource | None = None

    @abstractmethod
    def open_source(self) -> TokenSource:
        """Open the tokens, after preparing them if necessary. Several processes may call this at once."""

    def prepare_data(self) -> None:
        """Prepare the tokens, once per machine."""
        if self._for_prompts() is None:
            self.open_source()

    def setup(self, stage: str | None = None) -> None:
        """Open the tokens, on every rank.

        Raises:
            ValueError: If a part is shorter than one window.
        """
        prompts_alone = self._for_prompts()
        source = prompts_alone or self.open_source()
        for name, stream in {"training": source.train, "validation": source.val}.items():
            if prompts_alone is None and len(stream) < self.context_length + 1:
                raise ValueError(
                    f"The {name} part of {self.describe()} has {len(stream)} tokens, too few for one window of"
                    f" context_length + 1 = {self.context_length + 1}: lower `context_length` or give more data."
                )
        self._source = source
        self.__dict__.pop("tokenizer", None)
        super().setup(stage)

    def _for_prompts(self) -> TokenSource | None:
        """What prompts need, taken from the run's checkpoint without any text; None if the text must be read."""
        predicts = self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING
        if not predicts or not {TOKENIZER, "data.vocab_size"} <= self.kept.keys():
            return None
        spec, nothing = self.tokenizer_spec or keep_tokenizer(self.kept[TOKENIZER], self.cache_dir), TokenStream([])
        return TokenSource(train=nothing, val=nothing, vocab_size=self.kept["data.vocab_size"], tokenizer=spec)

    @property
    def vocab_size(self) -> int:
        """Number of possible tokens; available after `setup`, as everything below."""
        return self._opened.vocab_size

    @property
    def planned_vocab_size(self) -> int | None:
        """Number of possible tokens that the settings imply before any text is read; None if they do not."""
        if self.wanted_vocab_size is None and self.tokenizer_spec is not None:
            return len(load_tokenizer(self.tokenizer_spec))
        return self.wanted_vocab_size

    def checked_vocab_size(self, num_tokens: int, spec: str) -> int:
        """The vocabulary size that the user gave, by default that of a tokenizer.

        Args:
            num_tokens: Tokens of the tokenizer.
            spec: The tokenizer, for the message.

        Raises:
            ValueError: If the tokenizer has more tokens.
        """
        if self.wanted_vocab_size is not None and self.wanted_vocab_size < num_tokens:
            raise ValueError(
                f"`vocab_size` {self.wanted_vocab_size} is smaller than the {num_tokens} tokens of the tokenizer"
                f" {spec}: leave it out, or give at least that many."
            )
        return self.wanted_vocab_size or num_tokens

    @property
    def trains_tokenizer(self) -> bool:
        """Whether the tokenizer is trained on the text, and may have fewer tokens than planned."""
        return False

    @property
    def num_train_tokens(self) -> int:
        """Number of tokens in the training part."""
        return len(self._opened.train)

    @property
    def num_val_tokens(self) -> int:
        """Number of tokens in the validation part."""
        return len(self._opened.val)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes per validation token on average; None if the text is unknown."""
        source = self._opened
        return None if source.val_bytes is None else source.val_bytes / len(source.val)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast | None":
        """The tokenizer, or None if only tokens are known."""
        spec = self._opened.tokenizer
        return None if spec is None else load_tokenizer(spec)

    def meaning(self) -> dict[str, Any]:
        """See `SampledDataModule.meaning`: the vocabulary size, and the tokenizer if there is one."""
        meaning: dict[str, Any] = {"data.vocab_size": self.vocab_size}
        if (spec := self._opened.tokenizer) is not None:
            assert self.tokenizer is not None
            meaning |= {TOKENIZER: tokenizer_texts(spec), "end of a text": self.tokenizer.eos_token}
        return meaning

    def meaning_differs(self, saved: dict[str, Any]) -> str | None:
        """See `SampledDataModule.meaning_differs`."""
        own = self.meaning() if saved else {}
        if TOKENIZER not in saved or TOKENIZER not in own:
            return super().meaning_differs({name: saved[name] for name in ("data.vocab_size",) if name in saved})
        # The vocabulary may be padded beyond the tokenizer's.
        difference = tokenizers_differ(saved[TOKENIZER], own[TOKENIZER])
        if difference is None:
            return super().meaning_differs({name: saved[name] for name in ("end of a text",) if name in saved})
        return f"{difference}; {self.other_data}"

    def samples(self) -> dict[str, Any]:
        """See `SampledDataModule.samples`."""
        hashes = {"training tokens": self._opened.train, "validation tokens": self._opened.val}
        counts = {f"number of {name}": len(stream) for name, stream in hashes.items()}
        return counts | {name: hash_tokens(stream) for name, stream in hashes.items()}

    def unigram_loss(self) -> float:
        """Loss of predicting the training tokens' frequencies, in nats per validation token: any model must beat it."""
        return unigram_loss(self._opened.train, self._opened.val, vocab_size=self.vocab_size)

    def train_dataloader(self) -> DataLoader[Any]:
        """Random windows, counted over the whole run."""
        stream = self._opened.train
        dataset = TrainWindows(
            stream,
            context_length=self.context_length,
            seed=self.seed,
            num_samples=self.epoch_samples or max(1, len(stream) // self.context_length),
        )
        return self.train_loader(dataset, collate=self._collate)

    def val_dataloader(self) -> DataLoader[Any]:
        """The same windows in every evaluation."""
        return self._evaluation_loader(max_tokens=self.val_tokens)

    def test_dataloader(self) -> DataLoader[Any]:
        """The whole validation part, for any `val_tokens`."""
        return self._evaluation_loader(max_tokens=None)

    def predict_dataloader(self) -> DataLoader[Any]:
        """One batch per prompt: ``{"input_ids": (1, P), "prompt": [text]}``.

        Raises:
            ValueError: If there is no tokenizer, or no prompt.
        """
        if self.tokenizer is None:
            raise ValueError(f"Prompts need a tokenizer, and {self.describe()} has none: give `tokenizer`.")
        if not self.prompts:
            raise ValueError("`prompts` is empty: give at least one text to continue.")
        batches: list[dict[str, Tensor | list[str]]] = []
        for prompt in self.prompts:
            # An empty prompt means: write a document.
            ids = self.tokenizer.encode(prompt, add_special_tokens=False) or [self.tokenizer.eos_token_id]
            batches.append({"input_ids": torch.tensor([ids], dtype=torch.int64), "prompt": [prompt]})
        return DataLoader(batches, batch_size=1, collate_fn=_take_only)  # type: ignore[arg-type]

    @property
    def _opened(self) -> TokenSource:
        if self._source is None:
            raise RuntimeError(f"{type(self).__name__} is not set up: call `setup()` first.")
        return self._source

    def _evaluation_loader(self, *, max_tokens: int | None) -> DataLoader[Any]:
        dataset = ValidationWindows(self._opened.val, context_length=self.context_length, max_tokens=max_tokens)
        return self.evaluation_loader(dataset, collate=self._collate)

    @property
    def _collate(self) -> Callable[[list[Any]], dict[str, Tensor]]:
        return partial(collate_windows, context_length=self.context_length)


def _take_only(items: list[Any]) -> Any:
    return items[0]
