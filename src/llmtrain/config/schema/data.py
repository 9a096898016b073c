"""What a model is trained on."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixedSourceConfig:
    """Where a source lies and how much of it is wanted."""

    path: str
    """File, glob, folder or hub id (JSONL, JSON, Parquet, text; also compressed), or an `embedded:` one.

    For pretraining also token files: Megatron's NAME.bin and NAME.idx, flat .bin, .npy.
    """
    weight: float | None = Field(default=None, ge=0)
    """Share of the mixture, relative to the other sources' weights. Null: 1. 0: only in `data.phases`."""
    epochs: float | None = Field(default=None, gt=0)
    """Instead of `weight`, for every source: weights in proportion to size x epochs, as in the Pile."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Go through the source at most this often; what happens then, says `data.when_exhausted`."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset or of a folder with splits."""
    validation_path: str | None = None
    """Held-out documents or rows. Null: every `data.validation_every`-th of `path` is held out."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PhaseConfig:
    """Other weights for the rest of the run, or until the next phase begins."""

    start: float = Field(gt=0, lt=1)
    """Where the phase begins, as a share of the run."""
    weights: dict[str, float]
    """Weights of the sources; those that are not named are not drawn from in this phase."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureConfig:
    """How much of each source, and when. Read by `data/plans.py`."""

    temperature: float | None = Field(default=None, gt=0)
    """Instead of weights: each source counts size^(1/T). 1: in proportion to size; larger: nearer to all alike."""
    phases: list[PhaseConfig] = Field(default_factory=list)
    """Later phases of the run with weights of their own, such as an annealing phase; the first has the sources'."""
    when_exhausted: Literal["renormalise", "stop"] = "renormalise"
    """When a source has reached `max_epochs`: go on with the others' weights, or end the run there."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a row that cannot be read: stop and name it, or leave it out and say how many were, and why."""
    validation_every: int = Field(default=50, ge=2)
    """Hold out every n-th document or row of a source that names no `validation_path`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CleaningConfig:
    """What of a source's documents is left out, cut or masked before training. Read by `data/cleaning.py`."""

    languages: list[str] = Field(default_factory=list)
    """Keep documents in these languages only (ISO 639-1 codes: en, de, ...). Empty: all."""
    c4: bool = False
    """C4's rules for English web pages: only whole sentences, no menus, no code, no placeholder text."""
    c4_min_words_per_line: int = Field(default=5, ge=1)
    """C4: drop lines with fewer words."""
    c4_min_sentences: int = Field(default=3, ge=1)
    """C4: drop documents with fewer sentences left."""
    bad_words: str | None = None
    """File with a word or phrase a line; documents with one of them are dropped."""
    gopher_quality: bool = False
    """Gopher's rules on length, words, symbols, bullets and English stop words."""
    gopher_repetition: bool = False
    """Gopher's rules on repeated lines, paragraphs and word n-grams."""
    min_characters: int = Field(default=0, ge=0)
    """Drop documents that are shorter, after the rules above."""
    decontaminate: list[str] = Field(default_factory=list)
    """Evaluation sets (files, globs, folders or hub ids); documents that share an n-gram with one are dropped."""
    decontaminate_ngram: int = Field(default=13, ge=2)
    """How many words in a row count as shared."""
    mask_pii: list[Literal["mail", "ip", "phone"]] = Field(default_factory=list)
    """Replace mail addresses, public IP addresses or phone numbers by a placeholder."""
    phone_region: str = "US"
    """Country whose phone numbers are found without a country code (ISO 3166-1: US, DE, ...)."""
    exact_duplicates: bool = False
    """Keep only the first of documents that are the same but for spaces."""
    near_duplicates: bool = False
    """Keep only the first of documents that share most of their runs of five words (MinHash)."""
    near_similarity: float = Field(default=0.8, ge=0.5, lt=1)
    """Similarity (Jaccard) at which near-duplicates are found in nine cases of ten or more."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig(MixedSourceConfig):
    """One source of text documents (`data/documents.py`), or of token files as they are (`data/token_files.py`)."""

    text_column: str = "text"
    """Column that holds the text."""
    token_dtype: Literal["uint16", "uint32", "int32"] | None = None
    """Of flat `.bin` token files: what their numbers are. Null: as the file's header says, else uint16."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read at most this many documents."""
    published_gib: float | None = Field(default=None, gt=0)
    """Its published size in GiB of text, for `llmtrain show` to plan with before the data is there."""
    published_tokens: float | None = Field(default=None, gt=0)
    """Its published size in tokens, for the same."""
    cleaning: CleaningConfig | None = None
    """Instead of `data.cleaning`, for this source."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CorpusConfig(MixtureConfig):
    """The pretraining mixture: sources and weights."""

    sources: dict[str, SourceConfig]
    """Sources by name; the names appear in metrics as `data/<name>/tokens`."""
    cleaning: CleaningConfig = Field(default_factory=CleaningConfig)
    """What is left out, cut or masked before training; off unless asked for."""
    sequences: Literal["blocks", "documents"] = "blocks"
    """A row is a block of running text, cut anywhere, or whole documents, best-fit packed (longer ones are cut)."""
    streaming: bool = False
    """Encode text while training goes on, not before: for a corpus too large to prepare; not shuffled as a whole."""
    attend_across_documents: bool = True
    """Tokens see the documents before theirs in the row. false: their own alone, in which positions start at 0."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ColumnsConfig:
    """Which column holds what, where the names do not say it or say it wrongly. Read by `data/columns.py`."""

    messages: str | None = None
    """A list of messages, or a transcript in one text."""
    prompt: str | None = None
    """The question or instruction: text, or messages."""
    input: str | None = None
    """What the instruction is about (Alpaca): put below it."""
    history: str | None = None
    """Earlier turns, as a list of [question, answer]."""
    system: str | None = None
    """The system message."""
    completion: str | None = None
    """The answer that is learned, or that a label or a score is about."""
    chosen: str | None = None
    """The preferred answer, or the whole conversation with it."""
    rejected: str | None = None
    """The other answer, or the whole conversation with it."""
    label: str | None = None
    """Whether the completion is a good one: true or false, 1 or 0."""
    score: str | None = None
    """How good the completion is: the larger, the better."""
    answers: str | None = None
    """Several answers to the prompt: a list of texts, or of objects with a text and a score or rank."""
    scores: str | None = None
    """Their scores, in the same order: the larger, the better."""
    ranks: str | None = None
    """Their ranks, in the same order: 1 is the best, equal ranks are ties."""
    answer: str | None = None
    """The right answer that a model's own answer is checked against."""
    margin: str | None = None
    """How much better the preferred answer is: a number (`objective.margin_weight` of reward)."""
    role: str | None = None
    """Key of a message that says who speaks. Null: `role` or `from`."""
    content: str | None = None
    """Key of a message that holds what is said. Null: `content` or `value`."""
    train: str | None = None
    """Key of a message that says if it is learned (`data.loss_on=flagged`). Null: `train`, `training` or `weight`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TemplateConfig:
    """One way to word a row: Jinja over its columns. Read by `data/wordings.py`."""

    prompt: str
    """The question."""
    completion: str | None = None
    """The answer that is learned."""
    chosen: str | None = None
    """The preferred answer."""
    rejected: str | None = None
    """The other answer."""
    system: str | None = None
    """The system message."""
    answer: str | None = None
    """The right answer that a model's own answer is checked against."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RowSourceConfig(MixedSourceConfig):
    """One source of conversations or preference pairs. Read by `data/rows.py`."""

    max_rows: int | None = Field(default=None, ge=1)
    """Read at most this many rows."""
    columns: ColumnsConfig | None = None
    """Which column holds what; then no other is read. Null: told from their names, and said in the log."""
    roles: dict[str, str] = Field(default_factory=dict)
    """What other names of speakers mean, such as {customer: user, agent: assistant}."""
    templates: list[TemplateConfig] = Field(default_factory=list)
    """Wordings of a row, FLAN-style; which one a row gets depends on its number in the source alone."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampledPairsConfig:
    """Rejected answers sampled from the starting model itself, checked against the right answer."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the training pairs whose rejected answer is one of the model's own wrong answers."""
    prompts: int = Field(default=1024, ge=1)
    """Prompts to answer."""
    samples: int = Field(default=4, ge=1)
    """Answers sampled for each prompt."""
    temperature: float = Field(default=1.0, ge=0.001)
    """Sampling temperature."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer in tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RowsConfig(MixtureConfig):
    """The mixture of conversations (sft), pairs (reward, dpo) or prompts (ppo)."""

    sources: dict[str, RowSourceConfig]
    """Sources by name."""
    loss_on: Literal["all", "last", "flagged"] = "all"
    """Which of the assistant's turns are learned (sft): all, the last, or as the messages' own flags say."""
    too_long: Literal["drop", "cut", "split"] = "drop"
    """Rows longer than `train.sequence_length`: left out, cut, or (sft) divided between turns. Counted in the log."""
    packing: bool = False
    """Fill rows with several whole conversations, of which none sees another (sft); batches count packed rows."""
    sampled_pairs: SampledPairsConfig | None = None
    """Pairs against the starting model's own mistakes (reward and dpo; needs rows with a checkable answer)."""
