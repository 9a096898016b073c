"""C4's and Gopher's rules, as the datatrove library has them, each as a step of cleaning.

Raffel et al. 2020, "Exploring the limits of transfer learning", arXiv:1910.10683, section 2.2; Rae et al. 2021,
"Scaling language models: Gopher", arXiv:2112.11446, appendix A.1.1 and table A1.

Words are what stands between spaces, and sentences end at . ? or !. datatrove's own splitter is spaCy, ten to thirty
times slower; it takes punctuation marks for words, so that a tenth of good pages has "too few words with letters".
"""

import re
from collections import Counter

from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer

SENTENCE_END = re.compile(r"[.?!]+[\"'\u201d\u2019)\]]*(?:\s+|$)")

LINES = {
    "line-filter-too_long_word": "c4: lines with a word of over 1000 characters cut",
    "line-filter-no_terminal_punc": "c4: lines without terminal punctuation cut",
    "line-filter-too_few_words": "c4: lines with too few words cut",
    "line-filter-javascript": "c4: lines with javascript cut",
    "line-filter-policy": "c4: lines of policy notices cut",
}
REASONS = {
    "lorem_ipsum": "c4: lorem ipsum",
    "curly_bracket": "c4: curly bracket",
    "too_few_sentences": "c4: too few sentences",
    "gopher_short_doc": "gopher: too few words",
    "gopher_long_doc": "gopher: too many words",
    "gopher_below_avg_threshold": "gopher: words too short",
    "gopher_above_avg_threshold": "gopher: words too long",
    "gopher_too_many_hashes": "gopher: too many hash signs",
    "gopher_too_many_ellipsis": "gopher: too many ellipses",
    "gopher_too_many_bullets": "gopher: too many lines with bullets",
    "gopher_too_many_end_ellipsis": "gopher: too many lines that end with an ellipsis",
    "gopher_below_alpha_threshold": "gopher: too few words with letters",
    "gopher_enough_stop_words": "gopher: too few stop words",
    "empty": "gopher: empty",
    "dup_para_frac": "gopher: repeated paragraphs",
    "dup_para_char_frac": "gopher: repeated paragraphs",
    "dup_line_frac": "gopher: repeated lines",
    "dup_line_char_frac": "gopher: repeated lines",
}


class Splitter(WordTokenizer):
    """How texts are cut into words and sentences."""

    def word_tokenize(self, text: str) -> list[str]:
        """What stands between spaces."""
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        """The sentences of a text."""
        return [text[start:end] for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Where each sentence begins and ends."""
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        if not ends or ends[-1] < len(text):
            ends.append(len(text))
        return list(zip([0, *ends[:-1]], ends, strict=True))


class C4Rules(C4QualityFilter):
    """C4's rules on lines and pages; cuts lines out of the text."""

    def __init__(self, min_words_per_line: int, min_sentences: int) -> None:
        super().__init__(min_words_per_line=min_words_per_line, min_num_sentences=min_sentences, language=Splitter())
        self._lines: Counter[str] = Counter()

    def stat_update(self, *labels: str, value: int = 1, unit: str | None = None) -> None:
        """Count what datatrove says happened to a line."""
        for label in labels:
            self._lines[label] += value

    def __call__(self, text: str, counts: Counter[str]) -> str | None:
        """The lines that are left, or None."""
        self._lines.clear()
        document = Document(text=text, id="")
        if _dropped(self, document, counts):
            return None
        counts.update({LINES[label]: count for label, count in self._lines.items() if label in LINES})
        return str(document.text)


class GopherRules:
    """Gopher's rules on quality or repetition; drops documents."""

    def __init__(self, rules: type[GopherQualityFilter] | type[GopherRepetitionFilter]) -> None:
        self._rules = rules(language=Splitter())

    def __call__(self, text: str, counts: Counter[str]) -> str | None:
        """The text, or None."""
        return None if _dropped(self._rules, Document(text=text, id=""), counts) else text


def gopher_quality() -> GopherRules:
    """The rules of appendix A.1.1, "quality filtering"."""
    return GopherRules(GopherQualityFilter)


def gopher_repetition() -> GopherRules:
    """The rules of table A1."""
    return GopherRules(GopherRepetitionFilter)


def _dropped(rules: C4QualityFilter | GopherQualityFilter, document: Document, counts: Counter[str]) -> bool:
    """Whether the rules drop the document, which is counted; datatrove answers True or (False, reason)."""
    answer = rules.filter(document)
    if answer is True:
        return False
    reason = answer[1]
    counts[REASONS.get(reason) or _runs(reason)] += 1
    return True


def _runs(reason: str) -> str:
    """`top_2_gram` or `duplicated_5_n_grams` in words."""
    kind, *others = reason.split("_")
    length = next(filter(str.isdigit, others), "several")
    return (
        f"gopher: one run of {length} words too often" if kind == "top" else f"gopher: repeated runs of {length} words"
    )
