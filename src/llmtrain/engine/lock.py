"""Two runs never write the same folder: `.lock` in a run's folder says who does, and is touched while it goes on.

The main process of a launch holds it for all. An owner on the same machine that is gone, however it went, is succeeded
at once; of one on another machine only its silence tells.
"""

import contextlib
import errno
import getpass
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llmtrain.config.errors import UserError

# How often the owner shows that it lives, and the silence after which one on another machine is taken for gone.
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 300.0
# What file systems say that know no hard links.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLock:
    """Holds a run's folder while it is open. Raises UserError where another run holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / ".lock"
        self.owner = {
            "host": socket.gethostname(), "processes": _namespace(), "pid": os.getpid(), "born": _born(os.getpid()),
            "user": _user(), "started": time.time(), "token": secrets.token_hex(8),
        }  # fmt: skip
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._show_life, daemon=True, name="lock")

    def __enter__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}. Set runs_dir= to a folder that can be written and has "
                "room."
            ) from error
        self._beat.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._beat.join()
        if self._is_ours():
            self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        claim = self.path.with_name(f".lock.{self.owner['token']}.partial")
        claim.write_text(json.dumps(self.owner))
        try:
            while True:
                with contextlib.suppress(FileExistsError):
                    _put(claim, self.path)
                    return
                # both times are the file system's: clocks of machines differ
                os.utime(claim)
                before, silence = self._read(), claim.stat().st_mtime - self._touched()
                if before and _lives(before, silence):
                    raise UserError(self._refusal(before, silence))
                self._bury(before)
        finally:
            claim.unlink(missing_ok=True)

    def _bury(self, before: dict[str, Any]) -> None:
        """Remove the lock of an owner that is gone; what somebody else has put there meanwhile is put back."""
        aside = self.path.with_name(f".lock.{self.owner['token']}.gone.partial")
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, aside)
            if _parsed(aside) != before:
                with contextlib.suppress(FileExistsError):
                    _put(aside, self.path)
            aside.unlink()

    def _show_life(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the next beat may come through
                if self._read() and not self._is_ours():
                    # it has been stopped for so long that somebody else went on: it must not write once more
                    print(f"error: {self.folder} has been taken over by {_said(self._read())}", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(1)
                os.utime(self.path)

    def _is_ours(self) -> bool:
        return self._read().get("token") == self.owner["token"]

    def _read(self) -> dict[str, Any]:
        return _parsed(self.path)

    def _touched(self) -> float:
        with contextlib.suppress(OSError):
            return self.path.stat().st_mtime
        return 0.0

    def _refusal(self, before: dict[str, Any], silence: float) -> str:
        cure = "Wait for it, end it, or choose another run= name."
        if not _is_here(before):
            cure += f" If it is gone, the folder is free when {SILENCE_SECONDS:.0f} s have passed without a sign."
        return f"{self.folder} is in use by {_said(before)}, last sign of life {max(0.0, silence):.0f} s ago. {cure}"


def _put(source: Path, path: Path) -> None:
    """Raises FileExistsError where there is one."""
    try:
        os.link(source, path)  # whole or not at all, on a file system of several machines too
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with path.open("x") as file:
            file.write(source.read_text())


def _parsed(path: Path) -> dict[str, Any]:
    """What a lock says; empty where it is gone or says nothing."""
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    says = isinstance(said, dict) and isinstance(said.get("pid"), int) and isinstance(said.get("started"), int | float)
    return said if says else {}


def _said(owner: dict[str, Any]) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.get("started", 0)))
    return f"{owner.get('user')} on {owner.get('host')} (process {owner.get('pid')}, started {started})"


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether its process would be seen from here."""
    return (owner.get("host"), owner.get("processes")) == (socket.gethostname(), _namespace())


def _lives(owner: dict[str, Any], silence: float) -> bool:
    if not _is_here(owner):
        return silence < SILENCE_SECONDS
    pid = int(owner.get("pid", 0))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    # numbers of processes are used again
    return _born(pid) == owner.get("born")


def _born(pid: int) -> str:
    """When a process began, as the kernel counts; empty where it does not say, and for one that has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _namespace() -> str:
    """Which processes are seen from here: those of another container are not."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in containers
        return str(os.getuid())
