import hashlib
import time
from pathlib import Path

from llmtrain.data.files import FileDigests


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file, memory = tmp_path / "a.txt", tmp_path / "cache" / "digests.json"
    file.write_text("one")
    assert FileDigests(memory)(str(file)) == hashlib.sha256(b"one").hexdigest()
    before = memory.read_text()
    assert FileDigests(memory)(str(file)) == hashlib.sha256(b"one").hexdigest()
    assert memory.read_text() == before
    file.write_text("another")
    assert FileDigests(memory)(str(file)) == hashlib.sha256(b"another").hexdigest()


def test_thousands_of_small_files_are_quickly_digested(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(3000)]
    for file in files:
        file.write_text(file.name)
    digests = FileDigests(tmp_path / "digests.json")
    start = time.monotonic()
    found = {digests(str(file)) for file in files}
    assert len(found) == 3000
    assert time.monotonic() - start < 3  # half a minute where each is written down at once
