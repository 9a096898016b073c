"""Whether the files and folders that a config names are there."""

import glob
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from llmtrain.config.faults import nearest
from llmtrain.config.fields import parts
from llmtrain.config.plain import Finding
from llmtrain.config.token_paths import PACKED_SUFFIXES, TEXT_SUFFIXES, TOKEN_SUFFIXES, is_indexed_prefix
from llmtrain.config.view import NotValid, View

FOLDERS = ("model.init_from", "model.adapter_from", "reward_model")
# Commands that read runs and write none, and the folders that they name.
READ = {"generate": ("model",), "verify": ("checkpoint",)}
FILES = ("tokenizer.path", "tokenizer.chat_template")
SUFFIXES = (*TEXT_SUFFIXES, *PACKED_SUFFIXES, *TOKEN_SUFFIXES)
EMBEDDED_TEXT, EMBEDDED_ROWS = ("prose", "code", "arithmetic"), ("arithmetic",)


def path_findings(view: View, later: Collection[str]) -> Iterator[Finding]:
    """A finding for each path that is not there. A hub id is left to the loader; `later` may name "data" as a whole."""
    folders = READ.get(view.command, FOLDERS)
    for key in (*folders, *FILES):
        path = _get(view, key)
        if path is None or key in later:
            continue
        if not os.path.exists(path):
            yield Finding(parts(key), f"no such file or folder: {path}{_meant(path, _get(view, 'runs_dir'))}")
        elif key in folders and not os.path.isdir(path):
            yield Finding(parts(key), f"{path} is a file; name the folder that holds the config and the weights")
    if view.command not in READ:
        yield from _writable(_get(view, "runs_dir"))
    if "data" in later:
        return
    embedded = EMBEDDED_TEXT if view.command in ("pretrain", "prepare") else EMBEDDED_ROWS
    for name, source in view.sources().items():
        for key in ("path", "validation_path"):
            yield from _data(source.get(key), ("data", "sources", name, key), embedded)
        yield from _cleaning(source.get("cleaning") or {}, ("data", "sources", name, "cleaning"))
    yield from _cleaning(_block(view, "data.cleaning"), ("data", "cleaning"))
    yield from _data(_get(view, "eval.problems"), ("eval", "problems"), EMBEDDED_ROWS)


def _get(view: View, key: str) -> str | None:
    try:
        value = view[key]
    except NotValid:
        return None
    return value if isinstance(value, str) else None


def _block(view: View, key: str) -> Mapping[str, Any]:
    try:
        return dict(view[key])
    except NotValid:
        return {}


def _cleaning(said: Mapping[str, Any], key: tuple[str, ...]) -> Iterator[Finding]:
    """The lists and evaluation sets that cleaning reads."""
    words = said.get("bad_words")
    if words is not None and not os.path.isfile(words):
        yield Finding((*key, "bad_words"), f"no such file: {words}{_meant(words)}")
    for path in said.get("decontaminate", ()):
        if path.startswith("embedded:"):
            yield Finding((*key, "decontaminate"), f"{path!r}: nothing embedded here; name files or a hub data set")
        else:
            yield from _data(path, (*key, "decontaminate"), ())


def _writable(folder: str | None) -> Iterator[Finding]:
    """A finding if the folder is no folder or cannot be written; if it is yet to be made, of what it will stand in."""
    if folder is None:
        return
    place = os.path.abspath(folder)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        yield Finding(("runs_dir",), f"{place} is a file, not a folder")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Finding(("runs_dir",), f"{place} cannot be written by this user; name another folder")


def _data(path: str | None, key: tuple[str, ...], embedded: tuple[str, ...]) -> Iterator[Finding]:
    if path is None:
        return
    if path.startswith("embedded:"):
        if path.removeprefix("embedded:") not in embedded:
            yield Finding(key, f"{path!r}: embedded here is {', '.join(f'embedded:{name}' for name in embedded)}")
    elif is_local(path) and not is_here(path):
        yield Finding(key, f"no file matches {path}" if glob.has_magic(path) else f"no such file: {path}{_meant(path)}")


def is_here(path: str) -> bool:
    """Whether a file, a folder or something that a glob matches is on this machine."""
    found = glob.glob(path, recursive=True) if glob.has_magic(path) else os.path.exists(path)
    return bool(found) or is_indexed_prefix(path)


def is_local(path: str) -> bool:
    """Whether a path can only be a local one: a hub id has neither a suffix nor a leading dot or slash."""
    if "://" in path:
        return False
    return path.startswith(("/", "./", "../", "~")) or path.endswith(SUFFIXES) or glob.has_magic(path)


def _meant(path: str, runs_dir: str | None = None) -> str:
    """`; did you mean X?` from the folder that should hold it, or from the runs."""
    if runs_dir and os.path.exists(os.path.join(runs_dir, path)):
        return f"; did you mean {os.path.join(runs_dir, path)}?"
    folder, name = os.path.split(path.rstrip("/"))
    close = nearest(name, os.listdir(folder or "."), 0.75) if os.path.isdir(folder or ".") else None
    return f"; did you mean {os.path.join(folder, close)}?" if close else f" (from {os.getcwd()})"
