"""What a model learns from text: which tokens are predicted, and from what.

The keys of a corruption are those of the paper that it comes from. Each objective is for one kind of architecture.
"""

from typing import ClassVar, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT

# Sentinels of a tokenizer that is trained here, as many as T5's.
SENTINELS = 100


class SpanLengths(NamedTuple):
    """What a row of `text` tokens becomes under span corruption; each length is that of every row."""

    text: int
    noise: int
    """Tokens that are taken out."""
    spans: int
    """Pieces in which they are, each with a sentinel of its own."""
    inputs: int
    """What the encoder reads: what is left, a sentinel for each span, an end token."""
    targets: int
    """What the decoder writes: each sentinel and its span, an end token."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenLossConfig:
    """How a predicted token counts. Read by `objectives/logprobs.py`."""

    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-normaliser, which holds the logits near 0; 1e-4 is usual (PaLM, T5). Not in metrics."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over the vocabulary; 0.1 is usual in translation. Not in metrics."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NextTokenConfig(TokenLossConfig):
    """Each token from those before it."""

    name: Literal["next_token"] = "next_token"
    """Which objective."""
    architecture: ClassVar[str] = "decoder"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrefixConfig(TokenLossConfig):
    """Each token behind a prefix that sees itself in both directions. Read by `data/prefixes.py`."""

    name: Literal["prefix"] = "prefix"
    """Which objective."""
    min_share: float = Field(default=0.0, ge=0, le=1)
    """Shortest prefix, as a share of the row (or of the document, where none sees another); one token at least."""
    max_share: float = Field(default=1.0, ge=0, le=1)
    """Longest prefix; all lengths between are as likely, and one token at least is left to predict."""
    architecture: ClassVar[str] = "decoder"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FillInTheMiddleConfig(TokenLossConfig):
    """Documents in another order, beginning, end, middle, learned as next tokens. Read by `data/infilling.py`."""

    name: Literal["fill_in_the_middle"] = "fill_in_the_middle"
    """Which objective."""
    rate: float = Field(default=0.5, gt=0, le=1)
    """Share of the documents of a row that are put into another order."""
    spm_rate: float = Field(default=0.5, ge=0, le=1)
    """Share of these that have the end before the beginning (suffix-prefix-middle)."""
    architecture: ClassVar[str] = "decoder"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MaskedConfig(TokenLossConfig):
    """Hidden tokens from all others, as in BERT. Read by `data/masking.py`."""

    name: Literal["masked"] = "masked"
    """Which objective."""
    mask_rate: float = Field(default=0.15, gt=0, lt=1)
    """Share of a row's tokens of text that are predicted."""
    replace_rate: float = Field(default=0.8, ge=0, le=1)
    """Share of these that the model reads as the mask token."""
    random_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of these that it reads as a random token; the rest it reads as they are."""
    whole_words: bool = False
    """Predict all tokens of a word or none; a word goes from one token with a leading space to the next."""
    next_sentence: bool = False
    """Rows of two segments; tell whether the second one goes on from the first or is from another place."""
    architecture: ClassVar[str] = "encoder"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpanCorruptionConfig(TokenLossConfig):
    """The spans that were taken out of a text, as in T5. Read by `data/spans.py`."""

    name: Literal["span_corruption"] = "span_corruption"
    """Which objective. The encoder reads `train.sequence_length` tokens; rows of text are as long as that takes."""
    noise_density: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that are taken out."""
    mean_span_length: float = Field(default=3.0, ge=1)
    """Mean length in tokens of the spans taken out."""
    architecture: ClassVar[str] = "encoder_decoder"

    def lengths(self, text: int) -> SpanLengths:
        """What rows of `text` tokens, two at least, become (`random_spans_noise_mask` of the T5 code)."""
        noise = min(max(round(text * self.noise_density), 1), text - 1)
        spans = min(max(round(noise / self.mean_span_length), 1), text - noise)
        return SpanLengths(text, noise, spans, text - noise + spans + 1, noise + spans + 1)

    def lengths_for(self, inputs: int) -> SpanLengths:
        """The longest rows of text that become `inputs` tokens, three at least (`random_spans_helper` there).

        A token more of text makes the inputs one longer or leaves their length, so every length is met; unless so much
        is taken out that spans are as many as tokens are left. Then they may be shorter.
        """
        text = inputs - 1
        while self.lengths(text + 1).inputs <= inputs:
            text += 1
        return self.lengths(text)


NamedObjective = NextTokenConfig | PrefixConfig | FillInTheMiddleConfig | MaskedConfig | SpanCorruptionConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UsualObjectiveConfig(TokenLossConfig):
    """What models of an architecture are usually trained by, with the defaults of that objective."""

    name: Literal["auto"] = "auto"
    """For a decoder next_token, for an encoder masked, with next_sentence where it has a pooler, for an
    encoder_decoder span_corruption."""

    def of(self, architecture: str, pooler: bool) -> NamedObjective:
        """The objective of an architecture."""
        if architecture == "encoder":
            return MaskedConfig(z_loss=self.z_loss, label_smoothing=self.label_smoothing, next_sentence=pooler)
        kind = SpanCorruptionConfig if architecture == "encoder_decoder" else NextTokenConfig
        return kind(z_loss=self.z_loss, label_smoothing=self.label_smoothing)


ObjectiveConfig = UsualObjectiveConfig | NamedObjective
