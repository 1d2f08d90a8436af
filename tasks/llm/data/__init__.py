"""Token batches for language models: the standard library's own text, token files, text files and HF data sets."""

from .hf_text import HFText
from .module import TokenDataModule
from .text_files import StdlibText, TextFiles
from .token_files import TokenFiles

__all__ = ["HFText", "StdlibText", "TextFiles", "TokenDataModule", "TokenFiles"]
