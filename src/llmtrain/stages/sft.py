"""`llmtrain sft`: supervised fine-tuning on conversations; the loss is on the assistant's tokens only.

An encoder-decoder reads what stands before an answer and writes the answer: each answer is a row of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import SftConfig
from llmtrain.data.batches import ConversationBatches, PackedBatches, collate_conversations
from llmtrain.data.corpus import read_template
from llmtrain.data.encoding import TokenRow, load_conversations
from llmtrain.data.packing import PackedConversations
from llmtrain.data.records import Split
from llmtrain.data.sequence_pairs import SequencePairBatches, answers_by_source, collate_sequence_pairs
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer
from llmtrain.engine.distributed import bare, spread
from llmtrain.generation.engines import Replica
from llmtrain.models.heads import EncoderDecoder, LanguageModel
from llmtrain.objectives.batch import Batch
from llmtrain.objectives.next_token import NextToken
from llmtrain.objectives.sequence_to_sequence import SequenceToSequence
from llmtrain.stages import assembly, handover, starts
from llmtrain.stages.assembly import Run
from llmtrain.stages.evaluators import build_problems, evaluate_objective, held_out_batches
from llmtrain.stages.planning import Plan, row_digests


def run(config: SftConfig) -> None:
    """Train, or go on training."""
    assembly.start(stage, config)


def stage(config: SftConfig) -> None:
    """Build, build, build, fit."""
    run = Run.open(config)
    tokenizer = build_tokenizer(config)
    trained = starts.load_start(config)
    check_model(config, trained)
    writes_from_source = isinstance(trained, EncoderDecoder)
    length = starts.fitting_length(config, trained)

    def load(split: Split, limit: int | None) -> dict[str, list[TokenRow]]:
        return run.main_first(
            lambda: load_conversations(
                config.data, tokenizer, split=split, max_length=length, cache_dir=run.cache, limit=limit
            )
        )

    rows, held_out = load("train", None), load("validation", config.eval.max_rows)
    model = spread(run.adapt(trained), run.layout)

    said = row_digests(config.data, rows)
    batches, plan = build_batches(config, run, rows, said, length, tokenizer.pad_id, writes_from_source)
    packed = f", packed into {sum(plan.sizes.values()):,} rows" if config.data.packing else ""
    run.say(f"{plan.steps} steps over {sum(map(len, rows.values())):,} conversations in {len(rows)} sources{packed}")

    kind = SequenceToSequence if writes_from_source else NextToken
    measured: Sequence[Batch] = (
        held_out_batches(answers_by_source(held_out), collate_sequence_pairs, tokenizer.pad_id)
        if writes_from_source else held_out_batches(held_out, collate_conversations, tokenizer.pad_id)
    )  # fmt: skip
    measure = evaluate_objective(bare(model), kind(), measured, run.layout.device, ["loss"])
    problems = build_problems(config, tokenizer, Replica(trained), run.cache)
    run.write_samples("before", problems.samples)
    objective = kind(
        source_names=batches.order.mixture.names, z_loss=config.objective.z_loss,
        label_smoothing=config.objective.label_smoothing,
    )  # fmt: skip
    run.fit(
        model=model, trained=trained, batches=batches, objective=objective, tokenizer=tokenizer, plan=plan,
        evaluators=[measure, *problems.evaluators], fixed_shapes=config.data.packing,
    )  # fmt: skip
    run.write_samples("after", problems.samples)
    run.finish(trained, tokenizer, data=said, plan=plan)


def build_batches(
    config: SftConfig, run: Run[SftConfig], rows: Mapping[str, Sequence[TokenRow]], said: dict[str, Any], length: int,
    pad_id: int, writes_from_source: bool,
) -> tuple[ConversationBatches | PackedBatches | SequencePairBatches, Plan]:  # fmt: skip
    """The batches of the run, of single conversations, packed rows or answers with their sources; what it draws."""
    options: dict[str, Any] = {"pad_id": pad_id, "rank": run.layout.data_rank, "world": run.layout.data_world}
    if writes_from_source:
        answers = answers_by_source(rows)
        plan = run.plan(config.data, {name: len(each) for name, each in answers.items()}, said)
        return SequencePairBatches(answers, plan.order(config.seed), max_length=length, **options), plan
    if config.data.packing:
        packed = {name: PackedConversations(each, length) for name, each in rows.items()}
        plan = run.plan(config.data, {name: len(each) for name, each in packed.items()}, said)
        return PackedBatches(packed, plan.order(config.seed), length=length, **options), plan
    plan = run.plan(config.data, {name: len(each) for name, each in rows.items()}, said)
    return ConversationBatches(rows, plan.order(config.seed), max_length=length, **options), plan


def check_model(config: SftConfig, model: LanguageModel) -> None:
    """Raises ConfigError for a model that writes nothing, and for packed rows of one that reads a source."""
    folder, architecture = handover.parent(config), model.config.architecture
    if architecture == "encoder":
        raise ConfigError(f"model.init_from: {folder} holds an encoder, which writes no answers; name another model")
    if architecture == "encoder_decoder" and config.data.packing:
        raise ConfigError(
            f"data.packing: {folder} holds an encoder-decoder, whose rows are not packed; set it to false"
        )


def build_tokenizer(config: SftConfig) -> Tokenizer:
    """The tokenizer of the model, or of `tokenizer.path`, with its chat template or `tokenizer.chat_template`."""
    template = read_template(config.tokenizer.chat_template)
    return load_tokenizer(config.tokenizer.path or handover.model_folder(handover.parent(config)), template)
