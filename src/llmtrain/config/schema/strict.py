"""How strictly a config is read."""

from pydantic import ConfigDict

# strict: the YAML value must have the field's type already ("3" is no integer, 1 is no boolean).
# extra="forbid": an unknown key is a fault, never ignored.
STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
