"""Files of rows that are only added to, on a disk that may be full for a while."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

# What the disk says when it, a quota, or the largest size of a file is reached.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RowFile:
    """Adds whole rows. Those that find no room are kept, and written before later ones when there is some."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []

    def add(self, rows: Iterable[str]) -> None:
        """Add rows, each ending its line. Raises OSError for all but want of room."""
        self.waiting += rows
        try:
            self._write("".join(self.waiting).encode())
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
        else:
            self.waiting = []

    def _write(self, data: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(end)  # no half row
                raise
