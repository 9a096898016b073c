"""`llmtrain pretrain`: next-token training on a mixture of text."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import PretrainConfig, TrainConfig
from llmtrain.data.batches import LengthWarmup, TokenBatches, held_out_text
from llmtrain.data.documents import read_documents
from llmtrain.data.plans import source_weights
from llmtrain.data.records import Faults, Split
from llmtrain.data.shards import TokenSource, prepare_tokens
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from llmtrain.engine.distributed import bare, spread
from llmtrain.generation.rollouts import Replica
from llmtrain.generation.sampler import generate
from llmtrain.models.heads import LanguageModel
from llmtrain.objectives.next_token import NextToken
from llmtrain.stages import assembly, handover
from llmtrain.stages.assembly import Run
from llmtrain.stages.evaluators import Domain, evaluate_bits_per_byte, unigram_bits

EVALUATION_ROWS = 16
# The report shows how the model goes on from these.
BEGINNINGS = ("The ", "def ", "12 + 34 = ")


def run(config: PretrainConfig) -> None:
    """Train, or go on training."""
    assembly.start(stage, config)


def stage(config: PretrainConfig) -> None:
    """Build, build, build, fit."""
    run = Run.open(config)
    tokenizer = run.main_first(lambda: build_tokenizer(config, run.cache))
    sources = run.main_first(lambda: prepare(config, tokenizer, run.cache, "train"))
    held_out = run.main_first(lambda: prepare(config, tokenizer, run.cache, "validation"))
    trained = build_model(config, tokenizer)
    model = spread(trained, run.layout, config.engine.sharding)

    length = config.train.sequence_length
    parameters = sum(parameter.numel() for parameter in trained.parameters())
    sizes = {name: source.num_blocks(length) for name, source in sources.items()}
    mixture, steps = assembly.plan(config.data, config.train, sizes, parameters=parameters, tokens_per_row=length)
    batches = TokenBatches(
        sources, mixture, batch_rows=assembly.rows_per_step(config.train), sequence_length=length, seed=config.seed,
        rank=run.layout.rank, world=run.layout.world,
    )  # fmt: skip
    run.say(
        f"{parameters:,} parameters, {steps} steps, "
        f"{sum(map(len, sources.values())):,} tokens in {len(sources)} sources"
    )

    names = batches.order.mixture.names
    measure = evaluate_bits_per_byte(
        bare(model), NextToken(), domains(config, tokenizer, sources, held_out), run.layout.device
    )
    samples = Continuations(Replica(trained), tokenizer)
    run.write_samples("before", samples)
    run.fit(
        model=model, trained=trained, batches=warmed_up(config.train, batches), tokenizer=tokenizer, steps=steps,
        objective=NextToken(source_names=names), evaluators=[measure], fixed_shapes=True,
    )  # fmt: skip
    run.write_samples("after", samples)
    said = {name: digests(sources[name]) for name in names}
    run.finish(trained, tokenizer, data=said, order=batches.order, steps=steps)


def warmed_up(train: TrainConfig, batches: TokenBatches) -> TokenBatches | LengthWarmup:
    """The batches, in shorter rows at first where `train.length_warmup` says so."""
    if train.length_warmup is None:
        return batches
    first, steps = train.length_warmup.start_length, train.length_warmup.steps
    return LengthWarmup(
        batches, batches.counts, start_length=first, sequence_length=train.sequence_length, steps=steps
    )  # fmt: skip


def build_tokenizer(config: PretrainConfig, cache: Path) -> Tokenizer:
    """The tokenizer of `tokenizer.path`, of the model that training goes on from, or one trained on the mixture."""
    template = assembly.read_template(config.tokenizer.chat_template)
    if config.tokenizer.path:
        return load_tokenizer(config.tokenizer.path, template)
    if config.model.init_from:
        return load_tokenizer(handover.model_folder(config.model.init_from), template)
    kept = handover.run_folder(config) / "tokenizer"
    if not (kept / "tokenizer_config.json").is_file():
        train_tokenizer(mixed_text(config, cache), config.tokenizer.vocab_size, template).save(kept)
    return load_tokenizer(kept)


def mixed_text(config: PretrainConfig, cache: Path) -> Iterator[str]:
    """Text of all sources, each with its share of `tokenizer.train_bytes`."""
    weights = text_weights(config)
    for name, source in config.data.sources.items():
        left = config.tokenizer.train_bytes * weights[name] / sum(weights.values())
        faults = Faults(config.data.on_error)  # told of when the source is prepared
        for text in read_documents(source, config.data.validation_every, "train", cache, faults):
            if left <= 0:
                break
            yield text
            left -= len(text.encode())


def text_weights(config: PretrainConfig) -> dict[str, float]:
    """Weights at the start of the run, as far as they are known before the text has been counted."""
    sources = config.data.sources
    if config.data.temperature is not None or any(source.epochs for source in sources.values()):
        sizes = {name: source.published_gib for name, source in sources.items() if source.published_gib}
        if len(sizes) == len(sources):
            return source_weights(config.data, sizes)
        return dict.fromkeys(sources, 1.0)
    return source_weights(config.data, {})


def prepare(config: PretrainConfig, tokenizer: Tokenizer, cache: Path, split: Split) -> dict[str, TokenSource]:
    """The tokens of every source."""
    return {
        name: prepare_tokens(
            source, tokenizer=tokenizer, split=split, validation_every=config.data.validation_every, cache_dir=cache
        )
        for name, source in config.data.sources.items()
    }  # fmt: skip


def build_model(config: PretrainConfig, tokenizer: Tokenizer) -> LanguageModel:
    """A model with random weights that follow from the seed, or the one of `model.init_from`."""
    if config.model.init_from:
        model = assembly.load_policy(config.model.init_from)
        if model.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"tokenizer: it has {tokenizer.vocab_size} tokens, but the model in {config.model.init_from} only "
                f"{model.vocab_size}. Use the model's own tokenizer: leave tokenizer.path away."
            )
        return model
    return LanguageModel(config.model, tokenizer.vocab_size).initialise(torch.Generator().manual_seed(config.seed))


def domains(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    sources: Mapping[str, TokenSource],
    held_out: Mapping[str, TokenSource],
) -> dict[str, Domain]:
    """For each source: held-out blocks, their bytes, and a unigram model's bits per byte on them."""
    found = {}
    for number, (name, source) in enumerate(held_out.items()):
        text = held_out_text(
            source, number, tokenizer.token_bytes, max_blocks=config.eval.max_rows, batch_rows=EVALUATION_ROWS,
            length=config.train.sequence_length,
        )  # fmt: skip
        counts = torch.from_numpy(sources[name].token_counts(tokenizer.vocab_size))
        bits = sum(unigram_bits(counts, batch.tokens[:, 1:]) for batch in text.batches)
        found[name] = Domain(text.batches, text.num_bytes, bits / text.num_bytes)
    return found


def digests(source: TokenSource) -> dict[str, Any]:
    """What the lineage says of a source."""
    manifest = source.manifest
    return {
        "path": manifest.source, "documents": manifest.documents, "bytes": manifest.bytes, "tokens": manifest.tokens,
        "content": manifest.content, "tokenizer": manifest.tokenizer,
    }  # fmt: skip


class Continuations:
    """How the model goes on from a few beginnings, greedily."""

    def __init__(self, model: Replica, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self) -> list[dict[str, str]]:
        """The beginnings and what follows."""
        prompts = [self.tokenizer.encode(beginning) for beginning in BEGINNINGS]
        answers = generate(
            self.model(), prompts, max_new_tokens=40, stop_tokens=set(self.tokenizer.stop_ids), temperature=0.0
        )
        return [
            {"prompt": beginning, "answer": self.tokenizer.decode(answer)}
            for beginning, answer in zip(BEGINNINGS, answers, strict=True)
        ]
