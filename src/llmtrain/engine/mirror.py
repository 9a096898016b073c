"""A run's checkpoints a second time, at any URL that fsspec knows (s3://, gs://, hf://, file://, ...).

    URL/config.yaml, lineage.json, metrics.jsonl, ...    what a run needs besides, as it was at the last push
    URL/checkpoints/step-00001000/                       its manifest comes last: without one it is not a checkpoint

A thread of its own pushes what is there and not yet at the URL; training never waits for a network, and goes on without
one. A run whose folder is empty gets back what is there.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import CheckpointConfig
from llmtrain.engine import checkpoints, retention
from llmtrain.engine.checkpoints import Checkpoint

RUN_FILES = (
    "config.yaml", "lineage.json", "metrics.jsonl", "rollouts.jsonl", "warnings.jsonl", "faults.jsonl", "samples.json",
    "micro_batches.json",
)  # fmt: skip


class Mirror:
    """Where a run's folder is mirrored; the main process has it. Raises ConfigError for a URL that cannot be used."""

    def __init__(self, folder: Path, url: str, keep: CheckpointConfig) -> None:
        import fsspec  # reading configs and models does without it

        self.folder, self.url, self.keep = folder, url.rstrip("/"), keep
        try:
            self.files, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.mirror={url}: {error}") from error
        self.root = str(root).rstrip("/")
        self.fault: str | None = None
        """Why the last push did not come to its end."""
        self._known: dict[str, Checkpoint] = {}
        self._newest: int | None = None
        self._pushing: threading.Thread | None = None

    def push_later(self, newest: int) -> None:
        """Begin to push what is there, up to the step `newest`; what is being pushed is pushed to its end before."""
        self._newest = newest
        if self._pushing is None or not self._pushing.is_alive():
            self._pushing = threading.Thread(target=self._push, args=(newest,), name="mirror", daemon=True)
            self._pushing.start()

    def finish(self) -> None:
        """Wait until all that is there is at the URL, or the last push has failed."""
        if self._pushing is not None:
            self._pushing.join()
            if self._newest is not None and not self._is_complete(checkpoints.name_of(self._newest)):
                self._push(self._newest)

    def restore(self, say: Callable[[str], None]) -> None:
        """Fetch the run's files and its newest checkpoint that is whole, if there are any."""
        with self._errors():
            for name in RUN_FILES:
                if self.files.exists(f"{self.root}/{name}"):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self.files.get_file(f"{self.root}/{name}", str(self.folder / name))
            for name in sorted(self._steps(), reverse=True):
                if self._is_complete(name) and self._fetch(name, say):
                    say(f"{self.folder} begins with {name} of {self.url}")
                    return

    def _fetch(self, name: str, say: Callable[[str], None]) -> bool:
        final = self.folder / "checkpoints" / name
        aside = final.with_name(f".{name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        place = f"{self.root}/checkpoints/{name}"
        for path in self.files.find(place):
            target = aside / str(path)[len(place) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(path, str(target))
        os.replace(aside, final)
        fault = checkpoints.inspect(final)
        if fault:
            say(f"checkpoint {place} is passed over: {fault}")
            shutil.rmtree(final)
        return fault is None

    def _push(self, newest: int) -> None:
        try:
            for name in RUN_FILES:
                if (self.folder / name).is_file():
                    self._put(self.folder / name, name)
            for folder in sorted((self.folder / "checkpoints").glob("step-*")):
                if folder.name <= checkpoints.name_of(newest) and not self._is_same(folder):
                    self._put_checkpoint(folder)
            self._prune(newest)
            self.fault = None
        except Exception as error:  # each file system has its own kinds, and none is worth a run
            self.fault = str(error) or type(error).__name__

    def _put_checkpoint(self, folder: Path) -> None:
        place = f"checkpoints/{folder.name}"
        self._remove(folder.name)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
        for path in [*paths, folder / "manifest.json"]:
            self._put(path, f"{place}/{path.relative_to(folder)}")

    def _put(self, path: Path, name: str) -> None:
        target = f"{self.root}/{name}"
        self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.files.put_file(str(path), target)

    def _prune(self, newest: int) -> None:
        names = self._steps()
        complete = [self._read(name) for name in names if self._is_complete(name)]
        kept = {checkpoints.name_of(step) for step in retention.kept_steps(complete, newest, self.keep)}
        for name in names:
            if name not in kept:
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Its manifest first: what is removed by half is no checkpoint."""
        place = f"{self.root}/checkpoints/{name}"
        self._known.pop(name, None)
        if self.files.exists(f"{place}/manifest.json"):
            self.files.rm(f"{place}/manifest.json")
        if self.files.exists(place):
            self.files.rm(place, recursive=True)

    def _steps(self) -> list[str]:
        place = f"{self.root}/checkpoints"
        if not self.files.exists(place):
            return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in self.files.ls(place, detail=False))
        return sorted(name for name in names if name.startswith("step-"))

    def _is_complete(self, name: str) -> bool:
        return bool(self.files.exists(f"{self.root}/checkpoints/{name}/manifest.json"))

    def _is_same(self, folder: Path) -> bool:
        """Whether it is there already; a step that was done again replaces what was there."""
        if not self._is_complete(folder.name):
            return False
        return self._manifest(folder.name) == json.loads((folder / "manifest.json").read_text())

    def _read(self, name: str) -> Checkpoint:
        if name not in self._known:
            self._known[name] = checkpoints.from_manifest(Path(name), self._manifest(name))
        return self._known[name]

    def _manifest(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.files.cat_file(f"{self.root}/checkpoints/{name}/manifest.json")))

    @contextlib.contextmanager
    def _errors(self) -> Any:
        try:
            yield
        except Exception as error:  # as above; but a run must not begin anew because of a network
            raise ConfigError(
                f"checkpoint.mirror={self.url} cannot be read: {error}. Mend that, or leave the mirror away to begin "
                "anew."
            ) from error
