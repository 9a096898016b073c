"""JSON files that come with models, tokenizers and checkpoints, and so from anybody."""

import json
from pathlib import Path
from typing import Any

from llmtrain.config.errors import UserError

# The list of tensors of the largest published models has some 10 MB. What is parsed takes up to 20 times the bytes.
MAX_BYTES = 64 * 1024 * 1024


def read_object(path: Path, fault: type[UserError] = UserError) -> dict[str, Any]:
    """The JSON object in a file. Raises `fault`, which names the file, for anything else."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        content = json.loads(data.decode("utf-8")) if len(data) <= MAX_BYTES else None
    except OSError as error:
        raise fault(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise fault(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise fault(f"{path}: not valid JSON: {error}") from None
    if len(data) > MAX_BYTES:
        raise fault(f"{path}: longer than {MAX_BYTES:,} bytes, which no such file is")
    if not isinstance(content, dict):
        raise fault(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content
