"""The report of `adam-mini compare`: a page, the same in Markdown, and tables for other programs."""

from .render import write_report

__all__ = ["write_report"]
