"""Import paths in a config, with classes of the standard library: nothing here needs torch."""

import collections

import pytest

from llmtrain.config.errors import ConfigError
from llmtrain.config.targets import accepted_options, check_options, resolve_target


class Sample:
    def __init__(self, size: int, *, depth: int = 2) -> None: ...


def test_finds_the_class():
    assert resolve_target("collections.OrderedDict", dict, "key") is collections.OrderedDict


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("OrderedDict", "expected an import path such as"),
        ("", "expected an import path such as"),
        ("no_such_package.Name", "cannot import 'no_such_package'.*PYTHONPATH"),
        ("collections.OrderdDict", r"collections has no 'OrderdDict'; did you mean OrderedDict\?"),
        ("collections.deque", "expected a class derived from builtins.dict"),
        ("collections.namedtuple", "expected a class derived from builtins.dict"),
    ],
)
def test_refusals_name_key_and_cure(path, message):
    with pytest.raises(ConfigError, match=f"^the.key={path!r}: .*{message}"):
        resolve_target(path, dict, "the.key")


def test_options_against_the_signature():
    assert accepted_options(Sample) == {"size", "depth"}
    check_options(Sample, {"depth": 3}, "options")
    with pytest.raises(
        ConfigError, match=r"options.dept: Sample knows no such option; did you mean depth\? Allowed: depth$"
    ):
        check_options(Sample, {"dept": 3}, "options", reserved=("size",))
    with pytest.raises(ConfigError, match=r"options\.size: is set by a key of its own"):
        check_options(Sample, {"size": 3}, "options", reserved=("size",))
