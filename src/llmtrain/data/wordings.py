"""FLAN-style templates: one row of data, worded in one of several ways (`templates` of a source).

Which wording a row gets is a hash of its number in the source: the same in every run, and independent of which rows
are held out (taking the wordings in turn would hold out rows of one wording only).
"""

import dataclasses
from typing import Any

import jinja2

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowSourceConfig, TemplateConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.data.records import Record
from llmtrain.data.templates import environment


class Wordings:
    """The templates of a source. Raises DataError for one that is no valid Jinja."""

    def __init__(self, source: RowSourceConfig) -> None:
        self._templates = [_compiled(number, each) for number, each in enumerate(source.templates)]

    def __len__(self) -> int:
        return len(self._templates)

    def word(self, record: Record, number: int) -> Record:
        """What row `number` of the source says: `prompt`, `completion` and so on, as its template has them.

        Raises DataError where the template needs a column that is not there, or fails.
        """
        which = derive_seed("wording", number) % len(self._templates)
        said = {}
        for key, template in self._templates[which].items():
            try:
                said[key] = template.render(record)
            except jinja2.UndefinedError as error:
                there = ", ".join(record)
                raise DataError(f"templates.{which}.{key}: {error.message}; the row's columns are: {there}") from None
            except Exception as error:  # a template computes with the row's values: anything may go wrong
                raise DataError(f"templates.{which}.{key}: {type(error).__name__}: {error}") from None
        return said


def _compiled(number: int, template: TemplateConfig) -> dict[str, Any]:
    strict = environment().overlay(undefined=jinja2.StrictUndefined)
    compiled = {}
    for key, source in dataclasses.asdict(template).items():
        try:
            if source is not None:
                compiled[key] = strict.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            message = f"templates.{number}.{key} is no valid Jinja: line {error.lineno}: {error.message}"
            raise DataError(message) from None
    return compiled
