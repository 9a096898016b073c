"""What every stage does around its own parts: start processes, open the run, put the trainer together, finish.

A stage reads top to bottom as: build, build, build, fit. This module is the frame around it.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from llmtrain.config.compose import to_dict
from llmtrain.config.errors import UserError
from llmtrain.config.folders import CACHE
from llmtrain.config.json_files import read_object
from llmtrain.config.schema import CorpusConfig, LoraConfig, PretrainConfig, RowsConfig, StageConfig
from llmtrain.data.ledger import Ledger
from llmtrain.data.plans import describe_plan
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.engine import checkpoints, distributed, launching
from llmtrain.engine.checkpoints import Checkpoint
from llmtrain.engine.display import show_log
from llmtrain.engine.distributed import Layout
from llmtrain.engine.lock import RunLock
from llmtrain.engine.micro_batches import FoundRows
from llmtrain.engine.mirror import Mirror
from llmtrain.engine.profiling import Profiler
from llmtrain.engine.rank_logs import keep_log
from llmtrain.engine.report import write_report
from llmtrain.engine.speed import Speed, compile_pays, has_bfloat16, has_float8, has_float16, matmul_peak
from llmtrain.engine.steps import BatchSource, Objective
from llmtrain.engine.tracking import Tracker, check_trackers
from llmtrain.engine.trainer import Evaluator, Trainer
from llmtrain.engine.watchdog import Watchdog
from llmtrain.models.experts import expert_layers
from llmtrain.models.float8 import to_float8
from llmtrain.models.formats import save_config, save_model
from llmtrain.models.heads import ActorCritic, LanguageModel, ScalarModel, SharedActorCritic, trained_share
from llmtrain.models.lora import adapt, initialise_adapters, merged_state
from llmtrain.models.meta import on_meta
from llmtrain.models.mup import learning_rate_scales
from llmtrain.models.peft_folders import save_adapter
from llmtrain.models.transformer import Transformer
from llmtrain.objectives.own_positions import OwnPositions
from llmtrain.objectives.routing import Routed
from llmtrain.optim.optimizers import build_optimizer, optimizer_class, state_bytes_per_weight
from llmtrain.optim.schedules import learning_rate
from llmtrain.stages import handover
from llmtrain.stages.planning import Plan, drawn, make_plan, num_lengths

Config = TypeVar("Config", bound=StageConfig)
Made = TypeVar("Made")
Trained = TypeVar("Trained", LanguageModel, ScalarModel)
Samples = list[dict[str, str]]
AnyActorCritic = ActorCritic | SharedActorCritic


def start(stage: Callable[[Config], None], config: Config) -> None:
    """Run a stage: in this process, or in `engine.processes` new ones; a run that has finished is left alone."""
    config = handover.resolve_parents(config)
    # what can be refused is refused before data is prepared
    optimizer_class(config.optimizer)
    check_trackers(config.tracker)
    folder, first = handover.run_folder(config), launching.goes_first()
    with RunLock(folder) if first else contextlib.nullcontext():
        if first and (mirror := mirror_of(config)) and not handover.has_begun(folder):
            mirror.restore(lambda text: print(text, file=sys.stderr))
        lineage = handover.open_run(config) if first else handover.read_lineage(folder)
        if lineage.get("finished"):
            if first:
                print(
                    f"{folder} has finished already; nothing to do. Choose another run= name to train anew.",
                    file=sys.stderr,
                )
        elif config.engine.processes > 1 and not launching.launched_by_others():
            launching.launch(stage, (config,), config.engine.processes)
        else:
            stage(config)


def mirror_of(config: StageConfig) -> Mirror | None:
    """Where the run is mirrored, by its name below `checkpoint.mirror`."""
    if config.checkpoint.mirror is None:
        return None
    return Mirror(handover.run_folder(config), f"{config.checkpoint.mirror}/{config.run}", config.checkpoint)


@dataclasses.dataclass
class Run(Generic[Config]):
    """An open run: where it writes, where it runs, how it computes."""

    config: Config
    folder: Path
    layout: Layout
    started: float
    step: int | None = None
    """The step whose weights the model ends with; `fit` sets it."""

    @classmethod
    def open(cls, config: Config) -> "Run[Config]":
        """Join the other processes and seed what has no key of its own."""
        torch.manual_seed(config.seed)
        if config.engine.deterministic:
            distributed.be_deterministic()
        layout = distributed.join(config.engine.device, config.engine.threads)
        keep_log(handover.run_folder(config), layout.rank, layout.world)
        show_log(layout.is_main)
        layout = distributed.arrange(layout, config.engine)
        return cls(config, handover.run_folder(config), layout, time.monotonic())

    @property
    def cache(self) -> Path:
        """Where prepared data lies, shared by all runs."""
        return Path(self.config.runs_dir) / CACHE

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What was asked for, where the hardware computes in it; elsewhere float32 is faster and as good."""
        wanted, device = self.config.engine.precision, self.layout.device
        if wanted in ("bfloat16", "float8"):
            return torch.bfloat16 if has_bfloat16(device) else None
        return torch.float16 if wanted == "float16" and has_float16(device) else None

    @functools.cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint that the run goes on from."""
        return checkpoints.newest_good(self.folder / "checkpoints", self.layout, self.say)

    def plan(
        self, data: CorpusConfig | RowsConfig, sizes: Mapping[str, int], said: Mapping[str, Mapping[str, Any]], *,
        parameters: int = 0, tokens_per_row: int = 0,
    ) -> Plan:  # fmt: skip
        """Which rows come when; after a resume, from what each source has given already.

        `sizes` are the sources' rows, `said` is what the lineage says of them. Raises DataError for a source without
        rows, and for one whose rows have changed.
        """
        ledger = Ledger.read(self.checkpoint.folder) if self.checkpoint else None
        return make_plan(
            data, drawn(self.config), sizes, said, ledger=ledger, parameters=parameters, tokens_per_row=tokens_per_row
        )

    def autocast(self) -> torch.autocast:
        """The precision of matrix products in this run."""
        dtype = self.autocast_dtype
        return torch.autocast(self.layout.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def say(self, text: str) -> None:
        """Print a line to standard error, once."""
        if self.layout.is_main:
            print(text, file=sys.stderr, flush=True)

    def adapt(self, model: Trained) -> Trained:
        """The model with new adapters, all else frozen, where the config has them; else as it is.

        Its products are float8's where that was asked for and the hardware has it.
        """
        engine = self.config.engine
        if engine.precision == "float8" and has_float8(self.layout.device):
            converted = to_float8(model, engine.float8_scaling, emulated=self.layout.device.type == "cpu")
            self.say(f"engine.precision=float8: {converted} layers, scaled {engine.float8_scaling}")
        elif engine.precision == "float8":
            self.say("engine.precision=float8: this device has no float8 units; computing in bfloat16 where it can")
        if isinstance(self.config.adapter, LoraConfig):
            adapt(model, self.config.adapter)
            initialise_adapters(model, self.config.seed, "adapter")
            self.say(f"adapter=lora: {trained_share(model)}")
        return model

    def fit(
        self, *, model: nn.Module, trained: LanguageModel | ScalarModel | AnyActorCritic, batches: BatchSource,
        objective: Objective, tokenizer: Tokenizer, plan: Plan, evaluators: Sequence[Evaluator] = (),
        score: str | None = None, parts: Mapping[str, nn.Module] | None = None, fixed_shapes: bool = False,
        extra: Callable[[], Callable[[Path], None]] | None = None, first_steps: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        """Train. `model` is what `spread` made of `trained`; `fixed_shapes`: batches have one shape, or a few.

        Ends with the last weights in the model, or with the best ones (`checkpoint.final`; `score` is that of
        `handover.checkpoint_config`). `extra`, called at a checkpoint's step, returns what adds to its folder.
        `first_steps` are those of `parameter_groups`.
        """
        config, device, steps = self.config, self.layout.device, plan.steps
        precision = config.engine.precision
        if precision != "float32" and self.autocast_dtype is None:
            self.say(
                f"engine.precision={precision}: this processor has no {precision} units; "
                "computing in float32, which is faster here"
            )
        for module in trained.modules():
            if isinstance(module, Transformer):
                module.recompute = config.engine.activation_checkpointing
        length = config.train.sequence_length
        rows = config.train.batch_rows or (config.train.batch_tokens or 0) // length
        in_pipeline = self.layout.size("pipeline") > 1
        counted = outline(trained) if in_pipeline else trained
        flops, without_head = counted.flops_per_token(length), counted.flops_per_token(length, 0.0)
        head = counted.flops_per_token(length, 1.0) - without_head
        wanted = config.engine.compile
        in_parts = in_pipeline or self.layout.size("context") > 1
        compile_it = (
            wanted
            if isinstance(wanted, bool)
            else fixed_shapes
            and not in_parts
            and compile_pays(flops * steps * rows * length / num_lengths(config.train), device)
        )
        tracker = Tracker(
            self.folder,
            config.tracker,
            steps=steps,
            is_main=self.layout.is_main,
            run=config.run,
            run_config=to_dict(config),
        )
        peak = matmul_peak(device, self.autocast_dtype or torch.float32) * self.layout.world

        def extra_at(step: int) -> Callable[[Path], None]:
            ledger, write_more = plan.ledger(step), extra() if extra else None

            def write(folder: Path) -> None:
                describe(folder, saved_part(trained), tokenizer)
                handover.write_start(folder, config)
                ledger.write(folder)
                if write_more:
                    write_more(folder)

            return write

        streamed = isinstance(config, PretrainConfig) and config.data.streaming
        # the rows of a stream have no numbers
        known: dict[str, Any] = {} if streamed else {"rows_of": plan.order(config.seed).rows}
        if (size := self.layout.size("context")) > 1:
            objective = OwnPositions(objective, self.layout.token_rank % size, size)
        if layers := expert_layers(trained):
            routed = Routed(objective, layers, functools.partial(distributed.total, layout=self.layout), device)
            objective, known["after_update"] = routed, routed.after_update
        trainer = Trainer(
            folder=self.folder, layout=self.layout, model=model, batches=batches, objective=objective,
            optimizer=build_optimizer(
                trained, config.optimizer, learning_rate_scales(trained, config.optimizer.target), first_steps
            ),
            learning_rate=lambda step: learning_rate(
                step, peak=config.optimizer.lr, total_steps=steps, config=config.schedule
            ),
            steps=steps, stop_after=config.train.stop_after, seed=config.seed, tracker=tracker,
            checkpoint=handover.checkpoint_config(config, score),
            eval=config.eval, tracking=config.tracker, extra=extra_at, resume_from=self.checkpoint,
            mirror=mirror_of(config) if self.layout.is_main else None,
            evaluators=evaluators, parts=parts or {}, autocast=self.autocast,
            micro_batch_rows=self._micro_batch_rows(model, None if fixed_shapes else length),
            max_grad_norm=config.train.max_grad_norm, ema_decay=config.train.ema_decay, compile=compile_it,
            scale_loss=self.autocast_dtype == torch.float16,
            fixed_shapes=fixed_shapes, speed=Speed(device, without_head, peak, head), health=config.health, **known,
        )  # fmt: skip
        if config.engine.profile:
            trainer.profile = Profiler(self.folder, config.engine.profile, self.layout, steps, tracker.say)
        try:
            with Watchdog(self.folder, self.layout, config.engine.hang_minutes) as watchdog:
                trainer.progress = watchdog.beat
                self.step = trainer.fit()
        finally:
            tracker.close()

    def _micro_batch_rows(self, model: nn.Module, longest_row: int | None) -> int | FoundRows | None:
        """The number that the config gives, or what finds it; the moments of a run that begins are still to come."""
        if self.config.train.micro_batch_rows != "auto":
            return self.config.train.micro_batch_rows
        moments = 0.0 if self.checkpoint else state_bytes_per_weight(self.config.optimizer)
        reserved = round(moments * distributed.num_trained_here(model))
        return FoundRows(self.folder, self.layout, reserved=reserved, longest_row=longest_row)

    def main_first(self, make: Callable[[], Made]) -> Made:
        """What `make` returns; the main process goes first, so that the others find what it has put into the cache."""
        if self.layout.is_main:
            made = make()
            distributed.barrier(self.layout)
        else:
            distributed.barrier(self.layout)
            made = make()
        return made

    def finish(
        self, trained: LanguageModel | ScalarModel, tokenizer: Tokenizer, *, data: dict[str, Any], plan: Plan
    ) -> None:
        """Write `model/`, mark the run finished in `lineage.json`, write the report; all processes call this."""
        state = distributed.full_state(trained)
        if self.layout.is_main:
            aside, final = self.folder / ".model.partial", self.folder / "model"
            shutil.rmtree(aside, ignore_errors=True)
            try:
                save_model(aside, trained, state=merged_state(trained, state), extra_config=token_ids(tokenizer))
                if isinstance(self.config.adapter, LoraConfig):
                    base = str(handover.model_folder(handover.parent(self.config)))
                    save_adapter(self.folder / "adapter", trained, state, self.config.adapter, base)
            except SafetensorError as error:  # a full disk, say
                raise UserError(
                    f"cannot write {final}: {error}. The last checkpoint is complete: make room, run the command again."
                ) from error
            tokenizer.save(aside, trained.config.max_sequence_length)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)
            seconds = round(time.monotonic() - self.started, 1)
            lineage = handover.read_lineage(self.folder)
            mixture = describe_plan(plan.mixture, plan.steps * plan.batch_rows)
            said = {"data": data, "mixture": mixture, "step": self.step, "finished": time.time(), "seconds": seconds}
            handover.write_lineage(self.folder, lineage | said)
            print(f"finished: model in {final}, report {self._report()}", file=sys.stderr)
        distributed.barrier(self.layout)

    def _report(self) -> str:
        """Where it is, or why it is not: files that somebody has changed are not worth a run."""
        try:
            return str(write_report(self.folder))
        except Exception as error:
            return f"not written ({type(error).__name__}: {error})"

    def write_samples(self, moment: str, make: Callable[[], Samples]) -> None:
        """Keep what the model answers `before` or `after` the run, for the report; a resumed run keeps its first."""
        path = self.folder / "samples.json"
        kept = read_object(path) if path.is_file() else {}
        if distributed.agree(moment == "after" or moment not in kept, self.layout):
            samples = make()
            if self.layout.is_main:
                aside = path.with_name(".samples.json.partial")
                aside.write_text(json.dumps(kept | {moment: samples}, indent=1, ensure_ascii=False))
                os.replace(aside, path)


def describe(folder: Path, model: LanguageModel | ScalarModel, tokenizer: Tokenizer) -> None:
    """Write what a folder of weights needs to be read alone: the architecture and the tokenizer."""
    save_config(folder, model, extra_config=token_ids(tokenizer))
    tokenizer.save(folder, model.config.max_sequence_length)


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The special ids, as Transformers configs name them; several that end an answer are a list."""
    ends = sorted(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.pad_id,
    }


def outline(model: LanguageModel | ScalarModel | AnyActorCritic) -> LanguageModel | ScalarModel:
    """The whole architecture of a model of which this process has some layers, without numbers."""
    assert not isinstance(model, AnyActorCritic), "a pipeline holds one model"
    with on_meta():
        return type(model)(model.config, model.vocab_size)


def saved_part(model: LanguageModel | ScalarModel | AnyActorCritic) -> LanguageModel | ScalarModel:
    """What a run's `model/` holds: the model itself, or an actor-critic's policy."""
    return model.policy if isinstance(model, AnyActorCritic) else model
