"""Tokenizers: training a byte-level BPE, loading from disk, and comparing. Nothing is downloaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...atomic_files import atomic_file
from ...data.cache import digest, only_one

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, "<|user|>", "<|assistant|>")
# One token for every byte and for every special token.
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# End-of-text tokens of common tokenizers, for files that do not say which token it is.
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
_SETTINGS_FILES = ("tokenizer_config.json", "config.json")
_MAIN_FILE = "tokenizer.json"
# Texts on which pre-tokenizers and normalisers differ: case, accents, white space, digits, other scripts, code.
_PROBES = (
    "The quick brown fox isn't here; it's 12,345.67 km away!",
    "  def f(x):\n\t\treturn x**2  # squared\n\n",
    "Ünïcöde e\u0301 Straße ÇA İstanbul 中文字符 русский язык 🙂👍🏽",
)


def train_bpe(texts: Iterator[str], *, vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE, which encodes any text. The result depends on the texts alone.

    Args:
        texts: Documents.
        vocab_size: Number of tokens, with the special ones. The result has fewer if the texts have too few pairs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_files(spec: str) -> list[Path]:
    """The files of a local tokenizer.

    Args:
        spec: A `tokenizer.json`, or a folder with one.

    Raises:
        FileNotFoundError: If there is no such file or folder, as for a name on the Hub.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(
            f"The tokenizer {spec!r} is not a local file or folder, and nothing is downloaded: give a local"
            " tokenizer.json or a folder written by `save_pretrained`."
        )
    if not (path / _MAIN_FILE).is_file():
        raise FileNotFoundError(
            f"The folder {path} has no tokenizer.json: load the tokenizer once with `use_fast=True` and write it with"
            " `save_pretrained`."
        )
    names = (_MAIN_FILE, "special_tokens_map.json", "chat_template.jinja", *_SETTINGS_FILES)
    return [path / name for name in names if (path / name).is_file()]


def tokenizer_texts(spec: str) -> dict[str, str]:
    """The contents of a tokenizer's files by their names in a folder.

    Args:
        spec: A `tokenizer.json`, or a folder with one.

    Raises:
        FileNotFoundError: If there is no such file or folder.
    """
    files = tokenizer_files(spec)
    if len(files) == 1:
        return {_MAIN_FILE: files[0].read_text("utf-8")}
    return {file.name: file.read_text("utf-8") for file in files}


def keep_tokenizer(texts: dict[str, str], cache_dir: Path) -> str:
    """Write these files to a folder in the cache, and return it for `load_tokenizer`."""
    folder = cache_dir / f"tokenizer-{digest(texts)}"
    if any(not (folder / name).is_file() for name in texts):
        with only_one(folder):
            for name, text in texts.items():
                with atomic_file(folder / name) as file:
                    file.write(text.encode())
    return str(folder)


def tokenizers_differ(saved: dict[str, str], own: dict[str, str]) -> str | None:
    """How two tokenizers, each as `tokenizer_texts`, encode a text differently; None if they do not."""
    from tokenizers import Tokenizer

    if saved[_MAIN_FILE] == own[_MAIN_FILE]:
        return None
    theirs, ours = (Tokenizer.from_str(texts[_MAIN_FILE]) for texts in (saved, own))
    vocabulary, others = ours.get_vocab(), theirs.get_vocab()
    if moved := sum(vocabulary.get(token) != number for token, number in others.items()):
        return f"{moved} of the {len(others)} tokens of the run have other ids, or none, in the data's tokenizer"
    if len(vocabulary) > len(others):
        return f"the data's tokenizer has {len(vocabulary)} tokens, the run's {len(others)}"
    if any(theirs.encode(text).ids != ours.encode(text).ids for text in _PROBES):
        return "the data's tokenizer splits text into other tokens than the run's"
    return None


def load_tokenizer(spec: str) -> "PreTrainedTokenizerFast":
    """Load a local tokenizer, with its end-of-text token set.

    Args:
        spec: A `tokenizer.json`, or a folder with one.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it cannot be read, or no token is known to end a text.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = tokenizer_files(spec)
    try:
        if any(file.name in _SETTINGS_FILES for file in files):
            tokenizer = AutoTokenizer.from_pretrained(files[0].parent, local_files_only=True)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(files[0]))
    except Exception as error:
        # The Rust parser raises a bare `Exception`.
        raise ValueError(f"Cannot read the tokenizer {files[0]}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{files[0].parent} gives a {type(tokenizer).__name__}: a fast tokenizer is needed.")
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token is None:
        tokenizer.eos_token = next((token for token in _KNOWN_ENDS if token in vocabulary), None)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer {files[0]} does not say which token ends a text: give a folder with a tokenizer_config.json"
            " that sets `eos_token`."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD if PAD in vocabulary else tokenizer.eos_token
    return tokenizer
