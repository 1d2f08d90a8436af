"""The commands that a Markdown file tells its reader to type."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from checkout import ROOT, project_files

FENCE = re.compile(r"^[ \t]*```(?:bash|sh|shell|console)\b[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
SEPARATORS = {"&&", "||", ";", "|", "&", ">", ">>", "<"}
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
PLACEHOLDER = re.compile(r"\.\.\.|…|\$|^(?:RECIPE|CONFIG|NAME|FILE|FOLDER|PATH|MODEL|RUN)S?(?:\.\w+)?$")
# Subcommands of Lightning's command line, which can print their parsed configuration instead of running it.
TRAINER_SUBCOMMANDS = {"fit", "validate", "test", "predict"}


@dataclass(frozen=True)
class Command:
    """One simple command: its words, where a reader finds it, and the folder that the reader is in."""

    words: tuple[str, ...]
    place: str
    folder: str = "."

    @property
    def program(self) -> str:
        """The command's name without its folder."""
        return self.words[0].rpartition("/")[2]

    @property
    def is_complete(self) -> bool:
        """Whether it can be typed as it stands, without a word to fill in."""
        return not any(PLACEHOLDER.search(word) for word in self.words)

    def __str__(self) -> str:
        """Name the test after it."""
        return f"{self.place}: {shlex.join(self.words)}"


def commands_in(markdown: str, place: str) -> list[Command]:
    """The simple commands of all shell blocks: pipes, lists and `VAR=value` in front are taken apart."""
    found = []
    for block in FENCE.finditer(markdown):
        typed, folder = "", "."
        for line in block.group(1).replace("\\\n", " ").splitlines():
            typed += line.strip().removeprefix("$ ")
            try:
                for words in _split(typed):
                    folder = words[1] if words[0] == "cd" else folder
                    found.append(Command(words, place, folder))
            except ValueError:  # a quotation goes on in the next line
                typed += "\n"
            else:
                typed = ""
    return found


def _split(line: str) -> list[tuple[str, ...]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word in SEPARATORS:
            commands.append([])
        elif commands[-1] or not ASSIGNMENT.match(word):
            commands[-1].append(word)
    return [tuple(words) for words in commands if words]


def documented_commands(*programs: str) -> list[Command]:
    """Every command of the README and the other Markdown files that starts one of these programs, each once."""
    pages = [name for name in project_files() if name.suffix == ".md"]
    found = [command for name in pages for command in commands_in((ROOT / name).read_text(), str(Path(name)))]
    return list({command.words: command for command in found if command.program in programs}.values())
