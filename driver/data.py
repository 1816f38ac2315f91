"""Text files as batches of tokens: documents in a seeded order, packed one after the other, some of them with their middle moved.

A document is a run of lines between blank ones, cut after the line in which it reaches 8,192 bytes. Each epoch has an order of its own. A
document ends with the end mark; the tokens of all make one stream, cut into sequences without regard to where documents begin, and no
mask keeps documents apart (DeepSeek-V3 report, section 4.1). A share of the documents is written as prefix, suffix, middle:

    <|fim_begin|>prefix<|fim_hole|>suffix<|fim_end|>middle<|eos_token|>

Every random number is a function of the seed, the epoch and the document, and there is no state but a `Position`: a run that goes on
from one sees the same batches, whatever was read before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..ir.errors import DscError, require
from ..models.json_file import present
from .tokens import Tokenizer

LONGEST = 8192
"""Bytes after which a document is cut at the next end of a line, so that a file without blank lines is shuffled too."""


@dataclass(frozen=True)
class Position:
    """The next token: of which epoch, which document in that epoch's order, and which of the document's tokens."""

    epoch: int = 0
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class TextFile:
    """A text file as it was when it was first read: `documents` int64 [n, 2] are the first and the last byte + 1 of each."""

    path: Path
    size: int
    modified: int
    sha256: str
    documents: np.ndarray = field(repr=False)

    def read(self, document: int) -> str:
        """The text of a document. Raises `DscError` if the file is no longer there or no longer the same."""
        first, last = (int(n) for n in self.documents[document])
        try:
            with self.path.open("rb") as stream:
                status = self.path.stat()
                same = (status.st_size, status.st_mtime_ns) == (self.size, self.modified)
                require(same, f"{self.path}: has changed since training began")
                stream.seek(first)
                return stream.read(last - first).decode()
        except FileNotFoundError:
            raise DscError(f"{self.path}: has vanished since training began") from None
        except OSError as error:
            raise DscError(f"{self.path}: cannot be read: {error.strerror}") from None


def open_text(path: str | Path) -> TextFile:
    """Find the documents of a file. Raises `DscError` if it cannot be read, is not UTF-8, or holds nothing but blanks."""
    path = present(Path(path), "text")
    documents: list[tuple[int, int]] = []
    digest, at, start, end = hashlib.sha256(), 0, -1, -1
    try:
        status = path.stat()
        with path.open("rb") as stream:
            for line in stream:
                _check_text(path, line, at)
                digest.update(line)
                if not line.isspace():
                    start = at if start < 0 else start
                    end = at + len(line.rstrip(b"\r\n"))
                at += len(line)
                if start >= 0 and (line.isspace() or at - start >= LONGEST):
                    documents.append((start, end))
                    start = -1
    except OSError as error:
        raise DscError(f"{path}: cannot be read: {error.strerror}") from None
    if start >= 0:
        documents.append((start, end))
    require(bool(documents), f"{path}: empty" if not at else f"{path}: nothing but blanks")
    return TextFile(path, at, status.st_mtime_ns, digest.hexdigest(), np.array(documents, np.int64))


def _check_text(path: Path, line: bytes, at: int) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise DscError(f"{path}: not UTF-8 text: byte {at + error.start:,} is {line[error.start]:#04x}") from None


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a run, [batch, seq] each. `fim` is the share of documents whose middle is moved to the end."""

    files: Sequence[TextFile]
    tokenizer: Tokenizer
    batch: int
    seq: int
    seed: int = 0
    fim: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.fim <= 1, f"--fim is {self.fim:g}, expected a share between 0 and 1")
        wanted, found, document = self.batch * self.seq + 1, 0, 0
        while found < wanted and document < self.documents:
            found += len(self._tokens(0, document))
            document += 1
        require(
            found >= wanted,
            f"the data has {found:,} tokens, but one batch of {self.batch} sequences of {self.seq} takes {wanted:,}",
        )

    @property
    def documents(self) -> int:
        """How many documents an epoch has."""
        return sum(len(file.documents) for file in self.files)

    def next(self, position: Position) -> tuple[np.ndarray, np.ndarray, Position]:
        """The batch at `position`: tokens and labels, int64 [batch, seq], and where the batch after it begins.

        A label is the token after its token; the last label of a sequence is the first token of the next.
        """
        wanted, parts, at = self.batch * self.seq + 1, [], position
        while wanted:
            tokens = self._tokens(at.epoch, at.document)[at.token : at.token + wanted]
            parts.append(tokens)
            wanted -= len(tokens)
            last, at = at, self._advance(at, len(tokens))
        stream = np.concatenate(parts)
        shape = self.batch, self.seq
        after = Position(last.epoch, last.document, last.token + len(tokens) - 1)
        return stream[:-1].reshape(shape), stream[1:].reshape(shape), after

    def _advance(self, at: Position, count: int) -> Position:
        if at.token + count < len(self._tokens(at.epoch, at.document)):
            return Position(at.epoch, at.document, at.token + count)
        return Position(at.epoch, at.document + 1) if at.document + 1 < self.documents else Position(at.epoch + 1)

    def _tokens(self, epoch: int, document: int) -> np.ndarray:
        """The tokens of a document at its place in an epoch's order, its end mark included."""
        return _tokens_of(self, epoch, int(_order(self.seed, epoch, self.documents)[document]))

    def encode(self, epoch: int, document: int) -> np.ndarray:
        """The tokens of a document by its number in the files, as the epoch has them, int64 [n]."""
        text = self._read(document)
        begin, hole, end, eos = self.tokenizer.marks
        chosen, *cuts = _words(f"{self.seed}/{epoch}/{document}", 3)
        if chosen >= self.fim * 2.0**64:
            return np.append(self.tokenizer.encode(text), eos)
        first, last = sorted(int(word % (len(text) + 1)) for word in cuts)
        prefix, middle, suffix = (self.tokenizer.encode(part) for part in (text[:first], text[first:last], text[last:]))
        return np.concatenate([[begin], prefix, [hole], suffix, [end], middle, [eos]]).astype(np.int64)

    def _read(self, document: int) -> str:
        for file in self.files:
            if document < len(file.documents):
                return file.read(document)
            document -= len(file.documents)
        raise IndexError(document)


@lru_cache(maxsize=16)
def _tokens_of(batches: Batches, epoch: int, document: int) -> np.ndarray:
    return batches.encode(epoch, document)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, documents: int) -> np.ndarray:
    """The documents of an epoch in their order: sorted by a random word for each."""
    return np.argsort(_words(f"{seed}/{epoch}", documents), kind="stable")


def _words(key: str, count: int) -> np.ndarray:
    """Random 64-bit words that are a function of `key`, uint64 [count]: Philox keyed by SHA-256, the same in every version of NumPy."""
    digest = hashlib.sha256(f"data/{key}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
