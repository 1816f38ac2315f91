"""Text to batches: tokens against the `tokenizers` library, packing and resuming by properties, and what is said of bad data."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc import DscError
from dsc.driver.data import LONGEST, Batches, Position, open_text
from dsc.driver.tokens import MARKS, ByteTokenizer, FileTokenizer, open_tokenizer

BEGIN, HOLE, END, EOS = ByteTokenizer().marks
TEXT = "first line\nsecond line\n\nsecond document, größer\n\n\n \nthird\n"
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(text: str) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.txt"
        path.write_text(text, encoding="utf-8")
        return path

    return file


def epoch(batches: Batches, number: int = 0) -> list[list[int]]:
    """The tokens of each document of an epoch, in its order, end marks left out."""
    wanted, found, at = [], [[]], Position(number)
    while at.epoch == number:
        tokens, _, at = batches.next(at)
        wanted += tokens.ravel().tolist()
    for token in wanted:
        if token == EOS:
            found.append([])
        else:
            found[-1].append(token)
    return found[: batches.documents]


def text_of(tokens: list[int]) -> str:
    """A document's text, its middle moved back."""
    if tokens and tokens[0] == BEGIN:
        hole, end = tokens.index(HOLE), tokens.index(END)
        tokens = [*tokens[1:hole], *tokens[end + 1 :], *tokens[hole + 1 : end]]
    return bytes(tokens).decode()


@settings(max_examples=200)
@given(text=st.text())
def test_bytes_are_what_the_library_makes_of_our_tokenizer_json(text: str) -> None:
    ours = ByteTokenizer()
    library = tokenizers.Tokenizer.from_str(ours.files()["tokenizer.json"])
    library.encode_special_tokens = True
    assert ours.encode(text).tolist() == library.encode(text).ids == list(text.encode())
    assert library.decode(ours.encode(text).tolist()) == text
    assert [library.token_to_id(mark) for mark in MARKS] == list(ours.marks)
    assert library.get_vocab_size() == ours.size


def test_a_file_tokenizer_is_the_library(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    released = ["<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=[*released, MARKS[3]], show_progress=False)
    library.train_from_iterator([pydoc_data.topics.__doc__ or "", TEXT * 20], trainer)
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    found = open_tokenizer(path, 400, 0.1)
    assert found.marks == (0, 1, 2, 3)
    assert found.encode(TEXT).tolist() == library.encode(TEXT).ids
    assert 3 not in found.encode(f"a {MARKS[3]} in the text is text")
    assert found.files() == {"tokenizer.json": path.read_text(encoding="utf-8")}
    with pytest.raises(DscError, match=rf"^{path} has {found.size} tokens, but the model's vocab_size is {found.size - 1}$"):
        open_tokenizer(path, found.size - 1, 0.1)


def test_documents_stand_between_blank_lines(write: Write) -> None:
    file = open_text(write(TEXT))
    assert [file.read(i) for i in range(len(file.documents))] == ["first line\nsecond line", "second document, größer", "third"]
    assert file.path.read_bytes()[: file.documents[0, 1]] == b"first line\nsecond line"


def test_long_documents_are_cut_at_the_end_of_a_line() -> None:
    path = Path(pydoc_data.topics.__file__)
    file = open_text(path)
    parts = [file.read(i) for i in range(len(file.documents))]
    longest_line = max(map(len, path.read_bytes().splitlines())) + 1
    assert max(len(part.encode()) for part in parts) < LONGEST + longest_line
    whole = "".join(parts).split()
    assert whole == path.read_text(encoding="utf-8").split()


@pytest.mark.parametrize("fim", [0.0, 0.5, 1.0])
def test_an_epoch_has_every_document_once_whatever_is_moved(write: Write, fim: float) -> None:
    files = [open_text(write(TEXT)), open_text(write("fourth ä\n\nfifth\n"))]
    batches = Batches(files, ByteTokenizer(), 2, 3, seed=7, fim=fim)
    texts = sorted(file.read(i) for file in files for i in range(len(file.documents)))
    orders = [[text_of(tokens) for tokens in epoch(batches, number)] for number in range(6)]
    for order in orders:
        assert sorted(order) == texts
    assert len({tuple(order) for order in orders}) > 1, "every epoch has the same order"


def test_the_share_of_moved_middles_is_what_was_asked_for() -> None:
    batches = Batches([open_text(pydoc_data.topics.__file__)], ByteTokenizer(), 1, 64, fim=0.1)
    moved = sum(batches.encode(number, document)[0] == BEGIN for number in range(40) for document in range(batches.documents))
    total = 40 * batches.documents
    assert abs(moved - 0.1 * total) < 5 * (total * 0.1 * 0.9) ** 0.5  # five standard deviations of a binomial


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 3), seq=st.integers(1, 12), stop=st.integers(0, 30), seed=st.integers(0, 3))
def test_batches_are_one_stream_that_goes_on_from_any_position(
    tmp_path_factory: pytest.TempPathFactory, batch: int, seq: int, stop: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    first = Batches([open_text(path)], ByteTokenizer(), batch, seq, seed, 0.3)
    stream, at, kept = [], Position(), Position()
    for number in range(31):
        if number == stop:
            kept = at
        tokens, labels, at = first.next(at)
        assert tokens.shape == labels.shape == (batch, seq)
        assert tokens.dtype == labels.dtype == np.int64
        if stream:
            assert tokens.ravel()[0] == stream[-1], "a token is skipped or repeated"
        stream += labels.ravel().tolist()
        np.testing.assert_array_equal(tokens.ravel()[1:], labels.ravel()[:-1])
    again = Batches([open_text(path)], ByteTokenizer(), batch, seq, seed, 0.3)
    position = Position(**json.loads(json.dumps(vars(kept))))
    rest = []
    for _ in range(stop, 31):
        _, labels, position = again.next(position)
        rest += labels.ravel().tolist()
    assert rest == stream[stop * batch * seq :]
    assert position == at


def test_a_seed_gives_its_own_order(write: Write) -> None:
    files = [open_text(write("\n\n".join(f"document {i}" for i in range(20))))]
    first, same, other = (epoch(Batches(files, ByteTokenizer(), 1, 8, seed)) for seed in (1, 1, 2))
    assert first == same != other


def refuse(message: str, path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DscError) as error:
        open_text(path)
    assert str(error.value) == message.format(path=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{path}: empty"),
        (b" \n\n\t\n", "{path}: nothing but blanks"),
        (b"text\nmore \xff text", "{path}: not UTF-8 text: byte 10 is 0xff"),
        (b"\x7fELF\x02\x01\n\x00\x90", "{path}: not UTF-8 text: byte 8 is 0x90"),
        (b"cut short \xe6\x97", "{path}: not UTF-8 text: byte 10 is 0xe6"),
        (None, "{path}: no such file"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, content: bytes | None, message: str) -> None:
    refuse(message, tmp_path / "data.txt", content)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    refuse("{path}: found a folder, expected text", tmp_path, None)


def test_too_little_data_for_one_batch(write: Write) -> None:
    file = open_text(write("12345678"))
    Batches([file], ByteTokenizer(), 2, 4)  # eight bytes and the end mark are two times four tokens and a last label
    with pytest.raises(DscError, match=r"^the data has 9 tokens, but one batch of 3 sequences of 3 takes 10$"):
        Batches([file], ByteTokenizer(), 3, 3)


@pytest.mark.parametrize(("change", "message"), [("vanish", "has vanished since"), ("grow", "has changed since")])
def test_a_file_that_changes_during_the_run(write: Write, change: str, message: str) -> None:
    path = write("\n\n".join(f"document {i}" for i in range(200)))
    batches = Batches([open_text(path)], ByteTokenizer(), 1, 64)
    batches.next(Position())
    if change == "vanish":
        path.unlink()
    else:
        with path.open("a") as stream:
            stream.write("more")
        os.utime(path, ns=(0, 0))
    with pytest.raises(DscError, match=rf"^{path}: {message} training began$"):
        epoch(batches)


def test_the_vocabulary_must_hold_the_bytes_and_their_marks() -> None:
    assert open_tokenizer(None, 260, 0.1).size == 260
    with pytest.raises(DscError, match=r"^bytes and their marks are 260 tokens, but the model's vocab_size is 259$"):
        open_tokenizer(None, 259, 0.0)


def test_a_tokenizer_without_marks(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, MARKS[3]: 1}, unk_token="a"))
    library.save(str(path))
    assert open_tokenizer(path, 2, 0.0).marks == (None, None, None, 1)
    with pytest.raises(DscError, match=r"has no token <\|fim_begin\|>, .*, which --fim 0.1 needs; expected --fim 0$"):
        open_tokenizer(path, 2, 0.1)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(DscError, match=r"has no token <\|eos_token\|> or .*, which ends every document$"):
        FileTokenizer(path)
    path.write_text("{}")
    with pytest.raises(DscError, match=rf"^{path}: not a tokenizer.json: "):
        FileTokenizer(path)
    with pytest.raises(DscError, match=r"nowhere.json: no such file$"):
        FileTokenizer(tmp_path / "nowhere.json")


def test_the_library_is_only_needed_for_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert open_tokenizer(None, 300, 0.1).size == 260
    with pytest.raises(DscError, match=r"needs the package tokenizers: pip install tokenizers$"):
        open_tokenizer(tmp_path / "tokenizer.json", 300, 0.1)
