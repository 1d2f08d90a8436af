"""Language models: pre-training and generation with transformers' own classes."""

from .language_model import LanguageModel

__all__ = ["LanguageModel"]
