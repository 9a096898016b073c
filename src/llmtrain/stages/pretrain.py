"""`llmtrain pretrain`: training on a mixture of text, on next tokens or by another objective."""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import PretrainConfig, TrainConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.data.batches import LengthWarmup, TokenBatches, held_out_text
from llmtrain.data.corpus import corpus_tokenizer, read_template
from llmtrain.data.corruption import CorruptedBatches, TextBatches, held_out_key
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.sequences import Blocks, TextRows, text_rows
from llmtrain.data.shards import TokenSource
from llmtrain.data.streaming import HeldOutTokens, Stream, StreamedBatches, read_positions
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer
from llmtrain.engine.distributed import bare, spread
from llmtrain.generation.engines import Replica
from llmtrain.generation.sampler import generate
from llmtrain.models.heads import LanguageModel, make_model
from llmtrain.models.mup import at_width
from llmtrain.objectives.sequence_to_sequence import SequencePairBatch
from llmtrain.stages import assembly, handover, starts
from llmtrain.stages.assembly import Run
from llmtrain.stages.evaluators import Domain, evaluate_bits_per_byte, unigram_bits
from llmtrain.stages.planning import Plan
from llmtrain.stages.tasks import Task, build_task, check_model, check_rows, objective_of

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
    task = build_task(config, tokenizer)
    trained = build_model(config, tokenizer)
    parameters = sum(parameter.numel() for parameter in trained.parameters())
    model = spread(run.adapt(trained), run.layout)
    text = (streamed_text if config.data.streaming else prepared_text)(config, run, tokenizer, task, parameters)
    run.say(f"{parameters:,} parameters, {text.plan.steps} steps, {text.summary}")

    objective = task.objective(text.plan.mixture.names)
    measure = evaluate_bits_per_byte(bare(model), task.measure, text.domains, run.layout.device, task.metrics)
    samples = build_samples(trained, tokenizer, text.domains)
    run.write_samples("before", samples)
    run.fit(
        model=model, trained=trained, batches=warmed_up(config.train, text.batches), tokenizer=tokenizer,
        plan=text.plan, objective=objective, evaluators=[measure], fixed_shapes=True, extra=text.extra,
    )  # fmt: skip
    run.write_samples("after", samples)
    run.finish(trained, tokenizer, data=text.said, plan=text.plan)


class Text(NamedTuple):
    """What a run is trained on and measured by."""

    batches: TextBatches | CorruptedBatches[Any]
    plan: Plan
    said: dict[str, Any]
    """For the lineage."""
    domains: dict[str, Domain]
    summary: str
    extra: Callable[[], Callable[[Path], None]] | None = None
    """At a checkpoint, what writes into its folder what the batches need to go on."""


def prepared_text(
    config: PretrainConfig, run: Run[PretrainConfig], tokenizer: Tokenizer, task: Task, parameters: int
) -> Text:
    """Text that is encoded before training begins, once."""
    prepared = run.main_first(lambda: prepare_sources(config.data, tokenizer=tokenizer, cache_dir=run.cache))
    length = task.row_length
    sources = {name: source.train for name, source in prepared.items()}
    rows = {name: text_rows(source, config.data, length, tokenizer.pad_id) for name, source in sources.items()}
    check_rows(config, rows)
    said = {name: digests(source) for name, source in sources.items()}
    sizes = {name: len(each) for name, each in rows.items()}
    plan = run.plan(config.data, sizes, said, parameters=parameters, tokens_per_row=length)
    layout = run.layout
    batches = TokenBatches(
        rows, plan.order(config.seed), sequence_length=length, rank=layout.data_rank, world=layout.data_world
    )  # fmt: skip
    by_number = {number: rows[name] for number, name in enumerate(plan.mixture.names) if name in rows}
    domains = {}
    for number, (name, source) in enumerate(prepared.items()):
        held_out, of_training = source.validation, sources[name].token_counts(tokenizer.vocab_size)
        # text shorter than a row makes one shorter row
        shorter = min(length, len(held_out))
        blocks = text_rows(held_out, config.data, shorter, tokenizer.pad_id) if shorter > 1 else None
        domains[name] = domain(config, tokenizer, task, blocks, number, of_training)
    return Text(
        corrupted(config, task, batches, by_number),
        plan,
        said,
        measurable(domains),
        f"{sum(map(len, sources.values())):,} tokens in {len(sources)} sources",
    )


def streamed_text(
    config: PretrainConfig, run: Run[PretrainConfig], tokenizer: Tokenizer, task: Task, parameters: int
) -> Text:
    """Text that is encoded while training goes on."""
    length, layout = task.row_length, run.layout
    streams = {
        name: Stream(
            source, config.data, tokenizer, run.cache, length=length, key=derive_seed(config.seed, "stream", name)
        )
        for name, source in config.data.sources.items()
    }  # fmt: skip
    said = {name: streams[name].said() for name in streams}
    plan = run.plan(config.data, dict.fromkeys(streams, 1), said, parameters=parameters, tokens_per_row=length)
    if run.checkpoint:
        for name, position in read_positions(run.checkpoint.folder).items():
            if name in streams:
                streams[name].begin(position)
    batches = StreamedBatches(
        streams, plan.mixture, batch_rows=plan.batch_rows, first_step=run.checkpoint.step if run.checkpoint else 0,
        rank=layout.data_rank, world=layout.data_world,
    )  # fmt: skip
    domains = {}
    for number, (name, stream) in enumerate(streams.items()):
        held_out = HeldOutTokens(stream, config.eval.max_rows * length, tokenizer.vocab_size)
        shorter = min(length, len(held_out))
        blocks = Blocks(held_out, shorter, config.data.attend_across_documents) if shorter > 1 else None
        domains[name] = domain(config, tokenizer, task, blocks, number, held_out.training_counts)
    trained_on = corrupted(config, task, batches, {})
    return Text(trained_on, plan, said, measurable(domains), f"{len(streams)} streams", batches.positions)


def corrupted(
    config: PretrainConfig, task: Task, batches: TextBatches, rows: Mapping[int, TextRows]
) -> TextBatches | CorruptedBatches[Any]:
    """The batches as the objective wants them; `rows` are those of the sources by number."""
    return CorruptedBatches(batches, task.corrupt(rows), config.seed) if task.corrupt else batches


def warmed_up(
    train: TrainConfig, batches: TextBatches | CorruptedBatches[Any]
) -> TextBatches | CorruptedBatches[Any] | LengthWarmup:
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
        template = read_template(config.tokenizer.chat_template)
        return load_tokenizer(handover.model_folder(config.model.init_from), template)
    if config.tokenizer.path:
        return corpus_tokenizer(config.data, config.tokenizer, cache)
    kept = handover.run_folder(config) / "tokenizer"  # so that a run keeps it when its mixture changes
    if not (kept / "tokenizer_config.json").is_file():
        corpus_tokenizer(config.data, config.tokenizer, cache, [objective_of(config).name]).save(kept)
    return load_tokenizer(kept)


def build_model(config: PretrainConfig, tokenizer: Tokenizer) -> LanguageModel:
    """A model with random weights that follow from the seed, or the one of `model.init_from`."""
    if config.model.init_from:
        model = starts.load_start(config)
        if model.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"tokenizer: it has {tokenizer.vocab_size} tokens, but the model in {config.model.init_from} only "
                f"{model.vocab_size}. Use the model's own tokenizer: leave tokenizer.path away."
            )
        check_model(config, model)
        return model
    model = make_model(at_width(config.model), tokenizer.vocab_size)
    return model.initialise(torch.Generator().manual_seed(config.seed))


def domain(
    config: PretrainConfig, tokenizer: Tokenizer, task: Task, held_out: TextRows | None, number: int,
    training_counts: NDArray[np.int64],
) -> Domain | None:  # fmt: skip
    """Held-out rows of source `number`, the bytes of what is predicted in them, and a unigram model's bits per byte.

    None without any.
    """
    if held_out is None or not len(held_out):
        return None
    batches: list[Any] = held_out_text(held_out, number, max_rows=config.eval.max_rows, batch_rows=EVALUATION_ROWS)
    if task.corrupt_held_out:
        corrupt, keys = task.corrupt_held_out({number: held_out}), (held_out_key(number, row) for row in count())
        batches = [corrupt(batch, list(islice(keys, len(batch)))) for batch in batches]
    counts, predicted = torch.from_numpy(training_counts), [batch.predicted() for batch in batches]
    num_bytes = sum(int(tokenizer.token_bytes[tokens.numpy()].sum()) for tokens in predicted)
    bits = sum(unigram_bits(counts, tokens) for tokens in predicted)
    return Domain(batches, num_bytes, bits / num_bytes) if num_bytes else None


def measurable(domains: Mapping[str, Domain | None]) -> dict[str, Domain]:
    """The domains that have held-out text; says which have none."""
    for name, each in domains.items():
        if each is None:
            log.warning("data.sources.%s: nothing is held out; name a validation_path or lower validation_every", name)
    return {name: each for name, each in domains.items() if each}


def digests(source: TokenSource) -> dict[str, Any]:
    """What the lineage says of a source."""
    summary = source.summary
    return {
        "path": source.path, "documents": summary.documents, "bytes": summary.bytes, "tokens": summary.tokens,
        "content": summary.content, "tokenizer": source.tokenizer,
    }  # fmt: skip


def build_samples(
    model: LanguageModel, tokenizer: Tokenizer, domains: Mapping[str, Domain]
) -> Callable[[], list[dict[str, str]]]:
    """What the report shows of a model: how it goes on, or what it fills in; nothing of one that writes nothing."""
    replica, architecture = Replica(model), model.config.architecture
    if architecture == "encoder_decoder":
        held_out: list[Any] = [domain.batches[0][:1] for domain in domains.values()]
        return FilledSpans(replica, tokenizer, held_out)
    return Continuations(replica, tokenizer) if architecture == "decoder" else list


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


class FilledSpans:
    """What an encoder-decoder writes for the spans taken out of held-out rows, greedily."""

    def __init__(self, model: Replica, tokenizer: Tokenizer, rows: Sequence[SequencePairBatch]) -> None:
        self.model, self.tokenizer, self.rows = model, tokenizer, rows

    def __call__(self) -> list[dict[str, str]]:
        """The rows as they are read, what is written, and what stood there."""
        read, written = ([getattr(row, name)[0].tolist() for row in self.rows] for name in ("inputs", "targets"))
        answers = generate(
            self.model(), read, max_new_tokens=max(map(len, written), default=1),
            stop_tokens=set(self.tokenizer.stop_ids), temperature=0.0, start_token=self.tokenizer.pad_id,
        )  # fmt: skip
        texts = ([self.tokenizer.decode(ids, skip_special=False) for ids in rows] for rows in (read, answers, written))
        return [
            {"prompt": row, "answer": answer, "expected": expected}
            for row, answer, expected in zip(*texts, strict=True)
        ]
