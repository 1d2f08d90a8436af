"""Pages of `docs/use/` as a reader takes them: packages to install, files to write, commands to type."""

import re
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\S+\.(?:py|yaml|json|toml|sh))\b")


@dataclass(frozen=True)
class Page:
    """What a page asks its reader to do.

    Args:
        packages: What `pip install` gets, besides this project.
        files: Each block whose first line is a comment with a file's name.
        commands: The other blocks of the shell, but for `pip install`.
    """

    packages: tuple[str, ...]
    files: dict[str, str]
    commands: tuple[str, ...]

    @property
    def missing(self):
        """The first package that is not installed here."""
        return next((name for name in self.packages if not is_installed(name)), None)


def is_installed(package):
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def read_page(markdown):
    """The steps of a page."""
    packages, files, commands = [], {}, []
    for language, text in BLOCK.findall(markdown):
        if language == "bash":
            lines = text.splitlines()
            installs = [line for line in lines if line.startswith("pip install ")]
            words = [word for line in installs for word in shlex.split(line)[2:] if word[0] not in "-."]
            names = [re.split(r"[^\w.-]", word)[0] for word in words]
            packages += [name for name in names if name != "lightning-adam-mini"]
            commands += ["\n".join(line for line in lines if line not in installs)]
        elif found := FILE.match(text):
            files[found.group(1)] = text
    return Page(tuple(packages), files, tuple(filter(str.strip, commands)))
