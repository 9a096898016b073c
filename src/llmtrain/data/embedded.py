"""Text that is on every machine that has Python: enough to try each stage without a download.

What the standard library says (its reference topics and docstrings) is prose, its source files are code. Files are
read, never imported, in sorted order, so the text is the same wherever the same Python is.
"""

import ast
import functools
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llmtrain.config.errors import DataError
from llmtrain.data import arithmetic

PREFIX = "embedded:"
NAMES = ("prose", "code", "arithmetic")

# Tests, tables, machine-made files and what is not the standard library.
LEFT_OUT = frozenset({
    "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo", "ensurepip",
    "pydoc_data", "encodings", "lib-dynload",
})  # fmt: skip
FILE_BYTES = (500, 110_000)


def embedded_documents(name: str) -> Iterator[str]:
    """The documents of `embedded:<name>`. Raises DataError for a name that there is none of."""
    if name == "arithmetic":
        return arithmetic.documents()
    if name not in NAMES:
        raise DataError(f"{PREFIX}{name}: there is no such text; choose one of {', '.join(PREFIX + n for n in NAMES)}")
    return _prose() if name == "prose" else (text for _, text in _source_files())


def embedded_version(name: str) -> str:
    """What the text of `embedded:<name>` depends on: the code that makes it and the Python whose library it is."""
    code = b"".join(Path(file).read_bytes() for file in (__file__, arithmetic.__file__))
    return f"{name} of Python {platform.python_version()}, made by {hashlib.sha256(code).hexdigest()[:16]}"


def _prose() -> Iterator[str]:
    topics = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if topics.is_file():
        for statement in ast.parse(topics.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Dict):
                yield from ast.literal_eval(statement.value).values()
    for module, text in _source_files():
        documented = "\n\n".join(_docstrings(module, ast.parse(text)))
        if len(documented) > 200:
            yield documented + "\n"


def _docstrings(module: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            said = ast.get_docstring(node)
            if said and len(said) > 40:
                yield f"{getattr(node, 'name', module)}: {said}"


def _source_files() -> Iterator[tuple[str, str]]:
    """Module name and source of the files of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _source_paths(root):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield path.removesuffix(".py").replace("/", "."), text


@functools.cache
def _source_paths(root: Path) -> tuple[str, ...]:
    """Files of the standard library that are worth reading, in order; found once, since the walk takes its time."""
    found = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in LEFT_OUT and not name.startswith("config-")]
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        found += [path for path in paths if FILE_BYTES[0] <= path.stat().st_size <= FILE_BYTES[1]]
    return tuple(sorted(path.relative_to(root).as_posix() for path in found))
