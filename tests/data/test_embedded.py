from itertools import islice

import pytest

from llmtrain.config.errors import DataError
from llmtrain.data.embedded import embedded_documents


@pytest.mark.parametrize(("name", "documents"), [("prose", 150), ("code", 150), ("arithmetic", 1000)])
def test_each_text_is_large_and_always_the_same(name: str, documents: int) -> None:
    texts = list(islice(embedded_documents(name), documents))
    assert len(texts) == documents
    assert sum(map(len, texts)) > 300_000
    assert min(map(len, texts)) > 0
    assert texts[:60] == list(islice(embedded_documents(name), 60))


def test_prose_is_words_and_code_is_code() -> None:
    prose, code = ("\n".join(islice(embedded_documents(name), 120)) for name in ("prose", "code"))
    assert 'The "assert" statement' in prose
    assert code.count("\n    def ") > 500 > 20 * prose.count("\n    def ")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="embedded:prose, embedded:code, embedded:arithmetic"):
        embedded_documents("poetry")
