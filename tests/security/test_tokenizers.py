"""Tokenizers and chat templates from anybody: no way out of the sandbox, bounds on time and memory."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.security.hostile import Canary, JsonObject, refused

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowSourceConfig, TemplateConfig
from llmtrain.data import template_sandbox
from llmtrain.data.templates import ChatTemplate
from llmtrain.data.tokenizers import load_tokenizer, train_tokenizer
from llmtrain.data.wordings import Wordings

MESSAGES = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
ASTRAY = {"(a+)+$": "a" * 40 + "b", "(a|aa)+$": "a" * 60 + "b", "^(([a-z])+.)+[A-Z]([a-z])+$": "a" * 60 + "!"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer that can be loaded, until it is changed."""
    train_tokenizer(["some text for a few merges"], 300).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def change(folder: Path, how: Callable[[JsonObject], Any]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    how(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def told(action: Callable[[], Any]) -> str:
    """What it gives, as text, or the message by which it is refused."""
    try:
        return str(action() or "")
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("name", ["tokenizer.pkl", "tokenizer.bin", "vocab.pt", "tokenizer.json"])
def test_pickles_are_not_opened(name: str, folder: Path, tmp_path: Path) -> None:
    canary = Canary(tmp_path / "canary")
    (folder / name).write_bytes(canary.pickled)
    if name == "tokenizer.json":
        with refused("not a tokenizer of the tokenizers library"):
            load_tokenizer(folder)
    else:
        load_tokenizer(folder)
    assert not canary.path.exists()


@pytest.mark.parametrize("number", [2**32 - 1, 2**33, -1])
def test_absurd_ids(number: int, folder: Path) -> None:
    change(folder, lambda content: content["model"]["vocab"].update(zzz=number))
    with refused(f"{folder}/tokenizer.json: not a tokenizer of the tokenizers library"):
        load_tokenizer(folder)


def test_absurd_ids_of_added_tokens_are_not_taken(folder: Path) -> None:
    added = {"id": 2**32 - 1, "content": "<x>", "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    change(folder, lambda content: content["added_tokens"].append(added))
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size < 400


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
@pytest.mark.parametrize("pattern", ASTRAY)
def test_regular_expressions_that_go_astray(pattern: str, part: str, folder: Path) -> None:
    kinds = {
        "pre_tokenizer": {"type": "Split", "behavior": "Isolated", "invert": False},
        "normalizer": {"type": "Replace", "content": ""},
    }
    change(folder, lambda content: content.update({part: kinds[part] | {"pattern": {"Regex": pattern}}}))
    tokenizer, before = load_tokenizer(folder), time.process_time()
    said = told(lambda: tokenizer.encode(ASTRAY[pattern]))
    assert said.startswith("[") or "the tokenizer cannot encode a text: Onig: Regex search error" in said
    assert time.process_time() - before < 20


def test_a_normalizer_that_makes_much_of_little(folder: Path) -> None:
    longer = {"type": "Replace", "pattern": {"String": "a"}, "content": 'a"' * 500}
    nested = {"type": "Sequence", "normalizers": [longer] * 5}
    change(folder, lambda content: content.update(normalizer=nested))
    with refused("its normalizer may put 1,000,000,000,000,000 characters in the place of one"):
        load_tokenizer(folder)
    change(folder, lambda content: content.update(normalizer={"type": "Prepend", "prepend": "a" * 10**6}))
    with refused("1,000,000 characters in the place of one"):
        load_tokenizer(folder)


BESIDE: dict[str, tuple[str, Any]] = {
    "nested": ("tokenizer_config.json", "[" * 100_000),
    "end that is no text": ("tokenizer_config.json", {"eos_token": 5}),
    "end that is a list": ("tokenizer_config.json", {"eos_token": [[]]}),
    "template that is no text": ("tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": 5}),
    "template without end": ("tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": "a" * 10**7}),
    "a file without end": ("chat_template.jinja", "a" * 10**7),
    "deep template": ("chat_template.jinja", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
    "loops in loops": ("chat_template.jinja", "{% for a in [1] %}" * 50 + "{% endfor %}" * 50),
    "a number of a million digits": ("chat_template.jinja", "{{ " + "9" * 10**6 + " }}"),
    "ids beyond counting": ("generation_config.json", {"eos_token_id": [10**30]}),
    "ids that are no numbers": ("generation_config.json", {"eos_token_id": "x"}),
    "negative ids": ("config.json", {"eos_token_id": [-1]}),
    "ids that are texts": ("config.json", {"pad_token_id": "x"}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_files_beside_it(name: str, folder: Path) -> None:
    file, content = BESIDE[name]
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with refused(str(folder)):
        load_tokenizer(folder)


# Chat templates ---------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ (''|attr('__class__')).mro() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__['json'].codecs.open('CANARY', 'w') }}",
    "{{ tojson.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]
LONG = "it makes a text or list longer than 16,777,216"
DOUBLED = "{%% set space = namespace(x='aa') %%}{%% for i in range(60) %%}{%% set space.x = %s %%}{%% endfor %%}"
TOO_LONG = {
    "{{ 'a' * 10**10 }}": LONG,
    "{{ 10**10 * [0] }}": LONG,
    "{{ 'a'.center(10000000000) }}": LONG,
    "{{ ('a'|attr('ljust'))(10000000000) }}": LONG,
    "{{ 'a'|center(10000000000) }}": LONG,
    "{{ ['a']|map('center', 10000000000)|list }}": LONG,
    "{{ 'a'|indent(10000000000, first=true) }}": LONG,
    "{{ messages|tojson(indent=10000000000) }}": LONG,
    "{{ '%10000000000d' % 1 }}": LONG,
    "{{ '%*d' % (10000000000, 1) }}": LONG,
    "{{ '%10000000000d'|format(1) }}": LONG,
    "{{ '{:>10000000000}'.format(1) }}": LONG,
    "{{ '{:>{w}}'.format(1, w=10000000000) }}": LONG,
    "{{ '{a:>10000000000}'.format_map({'a': 1}) }}": LONG,
    "{{ 'a\tb'.expandtabs(2000000000) }}": LONG,
    "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}": LONG,
    "{% set a = 'a' * 1000000 %}{{ a|replace('a', a) }}": LONG,
    "{% set a = 'a' * 1000000 %}{{ a.join(a) }}": LONG,
    "{% set a = 'a' * 1000000 %}{{ ([a] * 1000)|join(a) }}": LONG,
    "{% set a = 'a' * 1000000 %}{{ ('%s' * 1000) % ((a,) * 1000) }}": LONG,
    "{% set a = 'a' * 1000000 %}{% for i in range(1000) %}{{ a }}{% endfor %}": LONG,
    "{{ range(100000)|batch(1000000000, 'x')|list }}": LONG,
    "{{ 'a'|slice(1000000000)|list }}": LONG,
    DOUBLED % "space.x ~ space.x": LONG,
    DOUBLED % "space.x + space.x": LONG,
    DOUBLED.replace("'aa'", "[1]") % "space.x + space.x": "it makes",
    DOUBLED.replace("'aa'", "99") % "space.x * space.x": "it computes a number of more than 4,096 bits",
    "{{ 10**(10**10) }}": "it computes a number of more than 4,096 bits",
    "".join(f"{{% set a{number} = '{number:03}' * 5000000 %}}" for number in range(99)): "texts and lists of more than",
    "{% for i in range(10**12) %}{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth exceeded",
    "{{ lipsum(n=1000000) }}": "'lipsum' is undefined",
}
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "{% set a = 'a' * 9999999 %}{% for c in a %}{% set b = a|upper %}{% endfor %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out_of_the_sandbox(source: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    said = told(lambda: ChatTemplate(source.replace("CANARY", str(canary)), {}).render(MESSAGES).text)
    assert said == "" or said.startswith("the chat template refuses these messages: ")
    assert not canary.exists()


@pytest.mark.parametrize("source", TOO_LONG)
def test_what_would_fill_the_memory_is_refused_first(source: str) -> None:
    before = time.process_time()
    with refused("the chat template refuses these messages: ", TOO_LONG[source]):
        ChatTemplate(source, {}).render(MESSAGES)
    assert time.process_time() - before < 5


@pytest.mark.parametrize("source", ENDLESS)
def test_endless_templates_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.2)
    template, before = ChatTemplate(source, {}), time.monotonic()
    with pytest.raises(DataError, match=r"it computes for more than 0 seconds|texts and lists of more than"):
        template.render(MESSAGES)
    assert time.monotonic() - before < 20


def test_each_rendering_has_its_own_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(template_sandbox, "MAX_BYTES", 10_000)
    source = "{% for i in range(100) %}{{ 'a' ~ 'b' }}{% endfor %}"
    template = ChatTemplate(source, {})
    wordings = Wordings(RowSourceConfig(path="a", templates=[TemplateConfig(prompt=source, completion="{{ a }}")]))
    for _ in range(3):
        assert template.render(MESSAGES[:1]).text == "ab" * 100
        assert wordings.word({"a": "b"}, 0) == {"prompt": "ab" * 100, "completion": "b"}
        time.sleep(0.1)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(template.render, MESSAGES[:1]).result().text == "ab" * 100


def test_what_templates_do_goes_on_as_before() -> None:
    """As in Jinja without bounds."""
    import jinja2

    source = (
        "{{ '%s-%05d' % ('a', 7) }} {{ '{}-{:>5}'.format(1, 2) }} {{ 3 * 4 }} {{ 2**10 }} {{ 7 % 4 }} {{ 'ab' * 3 }} "
        "{{ [1] + [2] }} {{ 1.5 * 2 }} {{ 'a'|indent(2, first=true) }} {{ 'x'|replace('x', 'yy') }} "
        "{{ [1, 2]|join(',') }} {{ 'a'.join(['b', 'c']) }} {{ none ~ 5 ~ nope ~ 1.5 }} {{ 'a\tb'.expandtabs() }} "
        "{{ 'abc'|batch(2)|list }} {{ '%s'|format(1) }} {{ 'a'.center(5) }} {{ ['a']|map('upper')|join }} "
        "{% for m in messages %}{{ loop.index ~ m.role }}{% else %}none{% endfor %}"
        "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f(2) }}{{ messages|map(attribute='role')|join(' ') }}"
    )
    expected = jinja2.Environment().from_string(source).render(messages=MESSAGES[:1])
    assert ChatTemplate(source, {}).render(MESSAGES[:1]).text == expected
