from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.data.token_bytes import write_flat, write_indexed, write_npy

from llmtrain.config.errors import DataError
from llmtrain.data import token_files
from llmtrain.data.token_files import find_token_files, open_token_file

END = 0
DOCUMENTS = [[5, 6, END], [7, END], [END], [8, 9, 10]]
TOKENS = [5, 6, END, 7, END, END, 8, 9, 10]
ENDS = [3, 5, 6, 9]
# NAME.idx of two documents, [1 2 | 3] and [4 5 6 7], as uint16: written by hand after the format's description.
INDEX = bytes.fromhex(
    "4d4d4944494458 0000"  # MMIDIDX
    "0100000000000000 08"  # version 1, uint16
    "0300000000000000 0300000000000000"  # 3 sequences, 3 entries for documents
    "02000000 01000000 04000000"  # tokens of each sequence
    "0000000000000000 0400000000000000 0600000000000000"  # their first bytes
    "0000000000000000 0200000000000000 0300000000000000"  # the documents' first sequences, and all of them
)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "CHUNK", 4)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_flat(path.with_suffix(".bin"), DOCUMENTS),
        lambda path: write_flat(path.with_suffix(".bin"), DOCUMENTS, magic=20240520),
        lambda path: write_npy(path.with_suffix(".npy"), DOCUMENTS),
        lambda path: write_npy(path.with_suffix(".npy"), DOCUMENTS, ">i4"),
        lambda path: write_indexed(path, [[each] for each in DOCUMENTS]),
        lambda path: write_indexed(path, [[[token] for token in each] for each in DOCUMENTS], "int32"),
    ],
    ids=["flat", "header", "npy", "npy of the other byte order", "indexed", "indexed in sequences"],
)
def test_each_kind_has_the_tokens_and_their_documents(write: Callable[[Path], str], tmp_path: Path) -> None:
    file = open_token_file(write(tmp_path / "a"), None, END)
    assert file.tokens.tolist() == TOKENS
    assert isinstance(file.tokens, np.memmap)
    for start in range(10):
        assert file.document_at(start) == sum(each <= start for each in ENDS)
        for end in range(start + 1, 10):
            assert file.ends(start, end).tolist() == [each for each in ENDS if start < each <= end]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_flat_files_have_the_type_that_is_said(dtype: str, tmp_path: Path) -> None:
    path = write_flat(tmp_path / "a.bin", DOCUMENTS, dtype)
    assert open_token_file(path, dtype, END).tokens.tolist() == TOKENS


def test_an_index_written_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(INDEX)
    (tmp_path / "a.bin").write_bytes(bytes.fromhex("0100 0200 0300 0400 0500 0600 0700"))
    file = open_token_file(str(tmp_path / "a.bin"), None, END)
    assert file.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert file.ends(0, 7).tolist() == [3, 7]
    assert write_indexed(tmp_path / "b", [[[1, 2], [3]], [[4, 5, 6, 7]]])
    assert (tmp_path / "b.idx").read_bytes() == INDEX


def test_documents_without_tokens_and_without_an_end(tmp_path: Path) -> None:
    path = write_indexed(tmp_path / "a", [[[]], [[1, 2]], [[]], [[3]]])
    assert open_token_file(path, None, END).ends(0, 3).tolist() == [2, 3]
    index = bytearray(INDEX)
    index[-8:] = (2).to_bytes(8, "little")  # the last document was not ended
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(bytes(14))
    assert open_token_file(path, None, END).ends(0, 7).tolist() == [3, 7]


def test_files_are_found_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    bins = [write_indexed(tmp_path / "data" / name, [[[1]]]) for name in "ba"]
    arrays = [write_npy(tmp_path / "data" / "c.npy", [[1]])]
    (tmp_path / "data" / "meta.pkl").write_bytes(b"")
    everything = [*sorted(bins), *arrays]
    assert find_token_files(str(tmp_path / "data"), "train") == everything
    assert find_token_files(str(tmp_path / "data" / "*"), "train") == everything
    for name in ("a", "a.bin", "a.idx"):
        assert find_token_files(str(tmp_path / "data" / name), "train") == bins[1:]
    write_flat(tmp_path / "data" / "some_train_1.bin", [[1]])
    held_out = write_flat(tmp_path / "data" / "some_val_0.bin", [[1]])
    assert find_token_files(str(tmp_path / "data"), "validation") == [held_out]


def damaged(start: int, change: bytes) -> bytes:
    return INDEX[:start] + change + INDEX[start + len(change) :]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b"TNTIDX\x00\x00" + INDEX, "older format (TNTIDX)"),
        (b"something else", "does not begin with MMIDIDX"),
        (damaged(9, b"\x02"), "version 2 of the format; version 1 is read"),
        (damaged(17, b"\x09"), "type 9 of the tokens"),
        (damaged(17, b"\x07"), "float32; tokens are whole numbers"),
        (damaged(17, b"\x04"), "3 tokens, but"),
        (INDEX[:-1], "93 bytes where its header makes 94; was it cut short?"),
        (INDEX + bytes(3), "no multimodal data sets"),
        (damaged(34, b"\x03"), "do they belong together?"),
        (damaged(54, b"\x02"), "do not follow one another"),
        (damaged(78, b"\x04"), "documents are not in order"),
    ],
)  # fmt: skip
def test_a_broken_index_is_told(index: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(bytes(12 if "3 tokens" in said else 14))
    with pytest.raises(DataError) as caught:
        open_token_file(str(tmp_path / "a.bin"), None, END)
    assert said in str(caught.value)
    assert str(tmp_path / "a.") in str(caught.value)


@pytest.mark.parametrize(
    ("write", "dtype", "said"),
    [
        (lambda path: write_flat(path / "a.bin", [range(1, 99)], "uint32"), None, "token_dtype=uint32"),
        (lambda path: write_flat(path / "a.bin", [[1, 2, 3]]), "uint32", "6 bytes are no whole number of uint32"),
        (lambda path: write_flat(path / "a.bin", [[1]], magic=20240520), "int32", "but its header says uint16"),
        (lambda path: write_flat(path / "a.bin", [[1]], magic=20240801), None, "version 1 of 20240801"),
        (lambda path: write_flat(path / "a.bin", [[1]], "uint32", magic=20240520), None, "1 tokens, but there are 2"),
        (lambda path: write_flat(path / "a.bin", [[]]), None, "no tokens in there"),
        (lambda path: write_npy(path / "a.npy", [[]]), None, "no tokens in there"),
        (lambda path: write_npy(path / "a.npy", [[1]]), "uint16", "has no effect: the file says itself"),
        (lambda path: write_npy(path / "a.npy", [[1]], "float32"), None, "found float32 of shape [1]"),
        (lambda path: write_npy(path / "a.npy", [[[1, 2]]]), None, "found uint16 of shape [1, 2]"),
        (lambda path: write_npy(path / "a.npy", [[1]], "object"), None, "not a .npy file of numbers"),
        (lambda path: write_flat(path / "a.npy", [[1]]), None, "not a .npy file of numbers"),
        (lambda path: write_flat(path / "a.bin.gz", [[1]]), None, "unpack it"),
        (lambda path: str(path / "a.bin"), None, "cannot be read: No such file"),
        (lambda path: write_indexed(path / "a", [[[1]]]), "uint16", "has no effect: the file says itself"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_told(
    write: Callable[[Path], str], dtype: str | None, said: str, tmp_path: Path
) -> None:
    path = write(tmp_path)
    with pytest.raises(DataError) as caught:
        open_token_file(path, dtype, END)
    assert str(caught.value).startswith(path)
    assert said in str(caught.value)
