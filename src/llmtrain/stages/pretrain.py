"""`llmtrain pretrain`: next-token training on a mixture of text."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import CleaningConfig, CorpusConfig, PretrainConfig, TokenizerConfig, TrainConfig
from llmtrain.data.batches import LengthWarmup, TokenBatches, held_out_text
from llmtrain.data.documents import read_documents
from llmtrain.data.plans import source_weights
from llmtrain.data.preparation import describe_source, prepare_sources
from llmtrain.data.records import Faults
from llmtrain.data.sequences import text_rows
from llmtrain.data.shards import TokenSource
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from llmtrain.engine.distributed import bare, spread
from llmtrain.generation.rollouts import Replica
from llmtrain.generation.sampler import generate
from llmtrain.models.heads import LanguageModel
from llmtrain.objectives.next_token import NextToken
from llmtrain.stages import assembly, handover
from llmtrain.stages.assembly import Run
from llmtrain.stages.evaluators import Domain, evaluate_bits_per_byte, unigram_bits

log = logging.getLogger(__name__)

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
    prepared = run.main_first(lambda: prepare_sources(config.data, tokenizer=tokenizer, cache_dir=run.cache))
    sources = {name: source.train for name, source in prepared.items()}
    held_out = {name: source.validation for name, source in prepared.items()}
    trained = build_model(config, tokenizer)
    model = spread(trained, run.layout, config.engine.sharding)

    length = config.train.sequence_length
    parameters = sum(parameter.numel() for parameter in trained.parameters())
    rows = {name: text_rows(source, config.data, length, tokenizer.pad_id) for name, source in sources.items()}
    sizes = {name: len(each) for name, each in rows.items()}
    said = {name: digests(source) for name, source in sources.items()}
    plan = run.plan(config.data, sizes, said, parameters=parameters, tokens_per_row=length)
    batches = TokenBatches(
        rows, plan.order(config.seed), sequence_length=length, rank=run.layout.rank, world=run.layout.world
    )
    run.say(
        f"{parameters:,} parameters, {plan.steps} steps, "
        f"{sum(map(len, sources.values())):,} tokens in {len(sources)} sources"
    )

    names = batches.order.mixture.names
    measure = evaluate_bits_per_byte(
        bare(model), NextToken(), domains(config, tokenizer, sources, held_out), run.layout.device
    )
    samples = Continuations(Replica(trained), tokenizer)
    run.write_samples("before", samples)
    run.fit(
        model=model, trained=trained, batches=warmed_up(config.train, batches), tokenizer=tokenizer, plan=plan,
        objective=NextToken(source_names=names), evaluators=[measure], fixed_shapes=True,
    )  # fmt: skip
    run.write_samples("after", samples)
    run.finish(trained, tokenizer, data=said, plan=plan)


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
    if config.model.init_from and not config.tokenizer.path:
        template = assembly.read_template(config.tokenizer.chat_template)
        return load_tokenizer(handover.model_folder(config.model.init_from), template)
    if config.tokenizer.path:
        return corpus_tokenizer(config.data, config.tokenizer, cache)
    kept = handover.run_folder(config) / "tokenizer"  # so that a run keeps it when its mixture changes
    if not (kept / "tokenizer_config.json").is_file():
        corpus_tokenizer(config.data, config.tokenizer, cache).save(kept)
    return load_tokenizer(kept)


def corpus_tokenizer(data: CorpusConfig, config: TokenizerConfig, cache: Path) -> Tokenizer:
    """The tokenizer of `tokenizer.path`, or one trained on the mixture: once, then found in the cache."""
    template = assembly.read_template(config.chat_template)
    if config.path:
        return load_tokenizer(config.path, template)
    weights = text_weights(data)
    sources = [
        [name, weights[name], describe_source(source, data.validation_every, CleaningConfig(), cache)]
        for name, source in data.sources.items()
    ]  # fmt: skip
    key = json.dumps([sources, config.vocab_size, config.train_bytes, template], sort_keys=True)
    folder = cache / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / "tokenizer_config.json").is_file():  # the last file to be written
        train_tokenizer(mixed_text(data, config, cache), config.vocab_size, template).save(folder)
    return load_tokenizer(folder)


def mixed_text(data: CorpusConfig, config: TokenizerConfig, cache: Path) -> Iterator[str]:
    """Text of all sources, each with its share of `tokenizer.train_bytes`."""
    weights = text_weights(data)
    for name, source in data.sources.items():
        left = config.train_bytes * weights[name] / sum(weights.values())
        faults = Faults(data.on_error)  # told of when the source is prepared
        for text in read_documents(source, data.validation_every, cache, faults):
            if left <= 0:
                break
            yield text
            left -= len(text.encode())


def text_weights(data: CorpusConfig) -> dict[str, float]:
    """Weights at the start of the run, as far as they are known before the text has been counted."""
    if data.temperature is not None or any(source.epochs for source in data.sources.values()):
        sizes = {name: source.published_gib for name, source in data.sources.items() if source.published_gib}
        if len(sizes) == len(data.sources):
            return source_weights(data, sizes)
        return dict.fromkeys(data.sources, 1.0)
    return source_weights(data, {})


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
        if len(source) < 2:  # nothing to be predicted
            log.warning("data.sources.%s: nothing is held out; name a validation_path or lower validation_every", name)
            continue
        # text shorter than a row makes one shorter row
        rows = text_rows(source, config.data, min(config.train.sequence_length, len(source)), tokenizer.pad_id)
        text = held_out_text(
            rows, number, tokenizer.token_bytes, max_rows=config.eval.max_rows, batch_rows=EVALUATION_ROWS
        )
        counts = torch.from_numpy(sources[name].token_counts(tokenizer.vocab_size))
        bits = sum(unigram_bits(counts, batch.tokens[batch.loss_mask]) for batch in text.batches)
        found[name] = Domain(text.batches, text.num_bytes, bits / text.num_bytes)
    return found


def digests(source: TokenSource) -> dict[str, Any]:
    """What the lineage says of a source."""
    summary = source.summary
    return {
        "path": source.path, "documents": summary.documents, "bytes": summary.bytes, "tokens": summary.tokens,
        "content": summary.content, "tokenizer": source.tokenizer,
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
