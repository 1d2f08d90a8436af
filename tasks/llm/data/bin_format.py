"""Token files of nanoGPT and llm.c: what is in one, and whether all of it is there.

nanoGPT writes bare tokens. llm.c writes a header of 256 int32 values first: a magic number, a version, the number of
tokens; the magic number says how a token is stored.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from .token_stream import STORAGE, TokenPart, TokenStream, TokenType

HEADER_BYTES = 1024
# Magic number: version, storage. 20240520 is llm.c's GPT-2 file, 20240801 its Llama-3 file.
LLMC_FORMATS: dict[int, tuple[int, TokenType]] = {20240520: (1, "uint16"), 20240801: (7, "uint32")}

_PROBE_BYTES = 2**14


def read_part(
    path: Path, *, token_type: Literal["auto", "uint16", "uint32"] = "auto", vocab_size: int | None = None
) -> TokenPart:
    """Look at a token file.

    Args:
        path: The file.
        token_type: How a token is stored. With "auto" llm.c's header says it, or the high halves of the first tokens,
            or ``vocab_size``.
        vocab_size: Possible tokens, where known.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, cut short, or stored otherwise than ``token_type`` says.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no token file {path}: check the path, or write it with nanoGPT's prepare.py."
        )
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"The token file {path} is empty: write it again.")
    with path.open("rb") as file:
        head = file.read(_PROBE_BYTES)
    header = np.frombuffer(head[:12], dtype="<i4") if len(head) >= 12 else None
    if header is not None and int(header[0]) in LLMC_FORMATS:
        return _read_llmc(path, size, header.tolist(), token_type)
    if token_type == "auto":
        wide = _looks_wide(head) or (vocab_size is not None and vocab_size > 2**16)
        token_type = "uint32" if wide else "uint16"
    elif token_type == "uint16" and _looks_wide(head):
        raise ValueError(
            f"Every second number in {path} is zero: it holds uint32 tokens, set `dtype` to uint32 or auto."
        )
    item_bytes = STORAGE[token_type].itemsize
    if size % item_bytes:
        raise ValueError(
            f"The token file {path} has {size} bytes, no multiple of the {item_bytes} of a {token_type} token: it is"
            " cut short, or `dtype` is wrong."
        )
    return TokenPart(path=path, token_type=token_type, offset=0, num_tokens=size // item_bytes)


def largest_token(parts: Sequence[TokenPart]) -> int:
    """The largest token id in the files, all of which are read."""
    return max(int(chunk.max()) for chunk in TokenStream(parts).chunks())


def _read_llmc(path: Path, size: int, header: list[int], token_type: str) -> TokenPart:
    magic, version, num_tokens = header
    known_version, stored = LLMC_FORMATS[magic]
    if version != known_version:
        raise ValueError(
            f"{path} is an llm.c file of version {version}, and version {known_version} is known for magic number"
            f" {magic}: write it again with llm.c's current data scripts."
        )
    if token_type not in ("auto", stored):
        raise ValueError(f"{path} is an llm.c file of {stored} tokens: set `dtype` to auto or {stored}.")
    found = (size - HEADER_BYTES) / STORAGE[stored].itemsize
    if found != num_tokens or num_tokens == 0:
        raise ValueError(
            f"The header of {path} promises {num_tokens} tokens, and {max(found, 0):g} follow: the file is cut short or"
            " damaged, fetch or write it again."
        )
    return TokenPart(path=path, token_type=stored, offset=HEADER_BYTES, num_tokens=num_tokens)


def _looks_wide(head: bytes) -> bool:
    halves = np.frombuffer(head[: len(head) // 4 * 4], dtype="<u2")
    # Sixteen tokens without one non-zero high half are no accident in 16-bit data, where a half is a token.
    return len(halves) >= 32 and not halves[1::2].any() and bool(halves.any())
