"""From text to token ids: a vocabulary of bytes, or a given tokenizer.json.

Bytes are tokens 0 to 255, and the marks of DeepSeek's data follow them (DeepSeek-V3 report, section 4.1):

    256 <|fim_begin|>    257 <|fim_hole|>    258 <|fim_end|>    259 <|eos_token|>
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..ir.errors import DscError, require
from ..models.json_file import present

MARKS = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>", "<|eos_token|>")
_RELEASED = (
    "<\uff5cfim\u2581begin\uff5c>",
    "<\uff5cfim\u2581hole\uff5c>",
    "<\uff5cfim\u2581end\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""How the tokenizer of the released models spells the marks: with a full-width bar and a lower one-eighth block."""


class Tokenizer(Protocol):
    """Text to ids."""

    @property
    def size(self) -> int:
        """All ids are below it."""

    @property
    def marks(self) -> tuple[int | None, int | None, int | None, int]:
        """The ids of `MARKS`, in order; the three of fill-in-the-middle are None where there are none."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int64 [n]; a mark that stands in the text is text."""

    def files(self) -> dict[str, str]:
        """What a checkpoint must hold, by file name, so that others tokenize as this one does."""


@dataclass(frozen=True)
class ByteTokenizer:
    """Each byte of the UTF-8 text is a token."""

    size: int = 256 + len(MARKS)
    marks: tuple[int, int, int, int] = (256, 257, 258, 259)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def files(self) -> dict[str, str]:
        """See `Tokenizer.files`: a byte-level BPE without merges, in which each byte has the printable stand-in that GPT-2 gave it."""
        marks = [
            {"id": id, "content": mark, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for mark, id in zip(MARKS, self.marks, strict=True)
        ]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        model = {"type": "BPE", "vocab": _stand_ins() | dict(zip(MARKS, self.marks, strict=True)), "merges": []}
        whole = {"version": "1.0", "added_tokens": marks, "pre_tokenizer": level, "decoder": level, "model": model}
        return {"tokenizer.json": json.dumps(whole, ensure_ascii=False, indent=2) + "\n"}


def _stand_ins() -> dict[str, int]:
    """A printable character for each byte: itself where it is printable, else one of those from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 0x100 + others.index(byte)): byte for byte in range(256)}


class FileTokenizer:
    """The tokenizer of a tokenizer.json, by the `tokenizers` library. Raises `DscError` where either is missing or unfit."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise DscError(f"--tokenizer {path} needs the package tokenizers: pip install tokenizers") from None
        try:
            self._text = present(self.path, "a tokenizer.json").read_text(encoding="utf-8")
            self._library: Any = Library.from_str(self._text)
        except OSError as error:
            raise DscError(f"{self.path}: cannot be read: {error.strerror}") from None
        except Exception as error:  # the library raises bare Exceptions
            raise DscError(f"{self.path}: not a tokenizer.json: {error}") from None
        self._library.encode_special_tokens = True
        self.size = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        *fim, eos = (self._id(names) for names in zip(MARKS, _RELEASED, strict=True))
        if eos is None:
            raise DscError(f"{self.path}: has no token {MARKS[3]} or {_RELEASED[3]}, which ends every document")
        self.marks = (fim[0], fim[1], fim[2], eos)

    def _id(self, names: tuple[str, ...]) -> int | None:
        return next((id for name in names if (id := self._library.token_to_id(name)) is not None), None)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return np.array(self._library.encode(text, add_special_tokens=False).ids, np.int64)

    def files(self) -> dict[str, str]:
        """See `Tokenizer.files`."""
        return {"tokenizer.json": self._text}


def open_tokenizer(path: str | Path | None, vocabulary: int, fim: float) -> Tokenizer:
    """The tokenizer of `path`, of bytes for None. Raises `DscError` where the vocabulary is too small for it, or a mark is missing."""
    tokenizer: Tokenizer = ByteTokenizer() if path is None else FileTokenizer(path)
    what = "bytes and their marks are" if path is None else f"{path} has"
    require(tokenizer.size <= vocabulary, f"{what} {tokenizer.size:,} tokens, but the model's vocab_size is {vocabulary:,}")
    lacking = [mark for mark, id in zip(MARKS, tokenizer.marks, strict=True) if id is None]
    require(not (lacking and fim), f"{path}: has no token {', '.join(lacking)}, which --fim {fim:g} needs; expected --fim 0")
    return tokenizer
