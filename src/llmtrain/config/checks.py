"""Combinations of keys that do not fit together, or of which one has no effect.

A check is a generator of findings. It reads keys from a `View` and ends by itself where a key is faulty already.
"""

from collections.abc import Callable, Collection, Iterator

from llmtrain.config.adapter_checks import ADAPTER_CHECKS
from llmtrain.config.context_checks import CONTEXT_CHECKS
from llmtrain.config.data_checks import DATA_CHECKS
from llmtrain.config.expert_checks import EXPERT_CHECKS
from llmtrain.config.fields import fields_of
from llmtrain.config.health_checks import HEALTH_CHECKS
from llmtrain.config.layout_checks import LAYOUT_CHECKS, data_processes, num_processes
from llmtrain.config.method_checks import METHOD_CHECKS, SAMPLING
from llmtrain.config.model_checks import MODEL_CHECKS
from llmtrain.config.objective_checks import OBJECTIVE_CHECKS
from llmtrain.config.paths import path_findings
from llmtrain.config.pipeline_checks import PIPELINE_CHECKS
from llmtrain.config.plain import Finding
from llmtrain.config.saving_checks import NAME, SAVING_CHECKS
from llmtrain.config.schema import ModelConfig
from llmtrain.config.view import NotValid, View, finding, no_effect

LENGTHS = ("train.steps", "train.tokens", "train.epochs", "train.tokens_per_parameter")
# Lengths of a length warm-up, the full one included: torch.compile takes as many shapes and falls back beyond them.
MAX_LENGTHS = 8
LEAST_TEMPERATURE = 0.001


def run_checks(view: View, later: Collection[str] = ()) -> list[Finding]:
    """All findings of all checks. `later`: keys whose folders need not exist yet."""
    found: list[Finding] = []
    for check in CHECKS:
        _collect(check(view), found)
    _collect(path_findings(view, later), found)
    return found


def _collect(findings: Iterator[Finding], found: list[Finding]) -> None:
    try:
        found.extend(findings)
    except NotValid:
        return


def _from_folder(view: View) -> bool:
    return view.command != "pretrain" or view["model.init_from"] is not None


def shown_run(view: View) -> Iterator[Finding]:
    """`show` takes a stage, or a model, or a run and what of it is to be shown."""
    if view.command != "show":
        return
    if view["model"] is not None:
        for key in ("run", "stage", "rows", "step", "document"):
            yield from no_effect(view, key, "a model is shown: leave model= away", "model")
    elif view["run"] is None:
        for key in ("step", "document"):
            yield from no_effect(view, key, "name the run that is meant: run=NAME")
    elif view["step"] is None and view["document"] is None:
        yield finding("say what is to be shown of it: step=N or document=FILE:NUMBER", "run")
    else:
        yield from no_effect(view, "overrides", "the run has its own config", "run")
        yield from no_effect(view, "stage", "the run has its own stage", "run")


def verified_run(view: View) -> Iterator[Finding]:
    """`verify` takes a checkpoint, or a run and one of its steps."""
    if view.command != "verify":
        return
    if view["run"] is None:
        for key in ("step", "processes"):
            yield from no_effect(view, key, "name the run that is meant: run=NAME")
    else:
        yield from no_effect(view, "checkpoint", "a run is verified: name one of the two", "run")


def sequence_fits(view: View) -> Iterator[Finding]:
    """A new model is built for at least the sequences it trains on."""
    length, longest = view["train.sequence_length"], view["model.max_sequence_length"]
    if not _from_folder(view) and length > longest:
        problem = f"{length} is longer than the model is built for: model.max_sequence_length={longest}"
        yield finding(problem, "train.sequence_length", "model.max_sequence_length")


def architecture_from_folder(view: View) -> Iterator[Finding]:
    """The architecture comes with the weights."""
    if not _from_folder(view):
        return
    why = "the architecture comes with the weights of model.init_from"
    if view.command != "pretrain" and view["model.init_from"] is None:
        why = "this stage starts from the newest finished run, whose architecture it takes; leave it away"
    for key in fields_of(ModelConfig):
        if key not in ("init_from", "adapter_from"):
            yield from no_effect(view, f"model.{key}", why)


def run_length(view: View) -> Iterator[Finding]:
    """How long a run lasts is said once."""
    given = [key for key in LENGTHS if view[key] is not None]
    allowed = LENGTHS if view.command == "pretrain" else ("train.steps", "train.epochs")
    for key in given:
        if key not in allowed:
            yield finding(f"is for pretrain only; {view.command} wants {' or '.join(allowed)}", key)
    if len(given) > 1:
        yield finding(f"the length of the run is said {len(given)} times: {', '.join(given)}; say it once", *given)
    if not given:
        yield finding(f"the length of the run is missing: give one of {', '.join(allowed)}", "train")


def batch_size(view: View) -> Iterator[Finding]:
    """Pretraining counts tokens, the other stages rows."""
    wanted, other = ("train.batch_tokens", "train.batch_rows")
    if view.command != "pretrain":
        wanted, other = other, wanted
    if view[other] is not None:
        yield finding(f"has no effect: {view.command} wants {wanted}", other)
    if view[wanted] is None:
        yield finding("needs a value: a whole number >= 1", wanted)


def whole_rows(view: View) -> Iterator[Finding]:
    """Pretraining's batch is whole rows of `sequence_length` tokens."""
    tokens, length = view["train.batch_tokens"], view["train.sequence_length"]
    if view.command == "pretrain" and tokens is not None and tokens % length:
        low = max(tokens // length, 1) * length
        problem = f"{tokens} is no multiple of train.sequence_length={length}, as {low} and {low + length} are"
        yield finding(problem, "train.batch_tokens", "train.sequence_length")


def rows_per_process(view: View) -> Iterator[Finding]:
    """Each process gets the same number of rows."""
    processes = data_processes(view)
    if view.command == "pretrain":
        tokens, length = view["train.batch_tokens"], view["train.sequence_length"]
        if tokens is not None and tokens % length == 0 and (tokens // length) % processes:
            problem = f"{tokens} tokens are {tokens // length} rows, which {processes} processes cannot share evenly"
            yield finding(problem, "train.batch_tokens", "engine.processes")
        return
    rows = view["train.batch_rows"]
    if rows is not None and rows % processes:
        problem = f"{rows} rows cannot be shared evenly by {processes} processes"
        yield finding(problem, "train.batch_rows", "engine.processes")


def hanging(view: View) -> Iterator[Finding]:
    """Only several processes can wait for each other."""
    if num_processes(view) == 1:
        yield from no_effect(view, "engine.hang_minutes", "there is one process, which waits for no other")


def low_precision(view: View) -> Iterator[Finding]:
    """Loss scaling is for updates; log-probabilities of what is sampled want more than float16's range.

    float8 is for layers that are a product and nothing else, and for losses that no second model is compared in.
    """
    if view["engine.precision"] == "float16" and view.command == "align" and view["method.name"] in SAMPLING:
        problem = f"float16 is not for method={view['method.name']}, which samples; use bfloat16 or float32"
        yield finding(problem, "engine.precision", "method.name")
    if view["engine.precision"] != "float8":
        yield from no_effect(view, "engine.float8_scaling", "nothing is scaled to float8", "engine.precision")
        return
    if view.command not in ("pretrain", "sft"):
        yield finding("float8 is for pretrain and sft; use bfloat16", "engine.precision")
    if view["engine.tensor_parallel"] > 1:
        yield finding("float8 does not go with engine.tensor_parallel", "engine.precision", "engine.tensor_parallel")
    if view["adapter.name"] != "none":
        yield finding("float8 does not go with adapters; use bfloat16", "engine.precision", "adapter")


def found_rows(view: View) -> Iterator[Finding]:
    """What fits an update may not fit what else reads in portions of as many rows."""
    key = "train.micro_batch_rows"
    if view[key] != "auto" or view.command != "align":
        return
    method = view["method.name"]
    if method in SAMPLING or method == "kto":
        yield finding(f"auto is for updates alone, and method={method} reads answers besides; give a number", key)
    elif view["method"].get("reference") == "precomputed":
        yield finding("auto is for updates alone, and method.reference=precomputed reads besides; give a number", key)


def profile(view: View) -> Iterator[Finding]:
    """The steps that are recorded are steps of the run."""
    key, steps = "engine.profile", view["train.steps"]
    if view[key] is None or steps is None:
        return
    first, number = view[f"{key}.first_step"], view[f"{key}.steps"]
    if first + number - 1 > steps:
        last = f"step {first} to {first + number - 1}" if number > 1 else f"step {first}"
        yield finding(f"{last} of a run of train.steps={steps}", f"{key}.first_step", f"{key}.steps", "train.steps")


def schedule(view: View) -> Iterator[Finding]:
    """Each schedule has its own options."""
    name = view["schedule.name"]
    if name != "wsd":
        why = f"{name} has no final decay; schedule=wsd has"
        yield from no_effect(view, "schedule.decay_steps", why, "schedule.name")
    if name in ("constant", "inverse_sqrt"):
        yield from no_effect(view, "schedule.min_lr_ratio", f"{name} has no last learning rate", "schedule.name")


def warmup(view: View) -> Iterator[Finding]:
    """The warm-up ends before the run; a warm-up from a lower layer may outlast a run cut short from above."""
    steps, warmup_steps = view["train.steps"], view["schedule.warmup_steps"]
    if steps is not None and warmup_steps > steps and view.rank("schedule.warmup_steps") >= view.rank("train.steps"):
        problem = f"{warmup_steps} steps of warm-up are longer than the run: train.steps={steps}"
        yield finding(problem, "schedule.warmup_steps", "train.steps")


def length_warmup(view: View) -> Iterator[Finding]:
    """Rows are doubled from the first length to the full one, before the run ends."""
    key, length = "train.length_warmup", view["train.sequence_length"]
    if view[key] is None:
        return
    if view.command != "pretrain":
        yield from no_effect(view, key, "only pretrain cuts its rows; leave it away")
        return
    first, warmup_steps, steps = view[f"{key}.start_length"], view[f"{key}.steps"], view["train.steps"]
    halves = [length >> n for n in range(1, MAX_LENGTHS) if length % 2**n == 0 and length >> n >= 2]
    if first not in halves:
        allowed = f"use one of {', '.join(map(str, halves))}" if halves else "its length has no half: leave it away"
        problem = f"{first} does not become train.sequence_length={length} by doubling; {allowed}"
        yield finding(problem, f"{key}.start_length", "train.sequence_length")
    if steps is not None and warmup_steps > steps:
        problem = f"{warmup_steps} steps of warm-up are longer than the run: train.steps={steps}"
        yield finding(problem, f"{key}.steps", "train.steps")


def best_checkpoint(view: View) -> Iterator[Finding]:
    """Keeping the best, or ending with it, needs a metric and its measurements."""
    best, kept, final = view["checkpoint.best_metric"], view["checkpoint.keep_best"], view["checkpoint.final"]
    if best is not None and view["eval.every_steps"] is None:
        yield finding("has no effect: nothing is measured on the way; set eval.every_steps", "checkpoint.best_metric")
    if best is not None and kept == 0 and final != "best":
        problem = "has no effect while checkpoint.keep_best=0 and checkpoint.final is not best"
        yield finding(problem, "checkpoint.best_metric", "checkpoint.keep_best", "checkpoint.final")
    if best is None and final == "best":
        problem = "needs a value: what checkpoint.final=best is best by, such as eval/loss"
        yield finding(problem, "checkpoint.best_metric", "checkpoint.final")
    elif best is None:
        why = "checkpoint.best_metric is not set"
        yield from no_effect(view, "checkpoint.keep_best", why)
        yield from no_effect(view, "checkpoint.best_mode", why)


def problems(view: View) -> Iterator[Finding]:
    """Problems are answered by models that write."""
    if view.command == "reward":
        yield from no_effect(view, "eval.problems", "a reward model answers no problems")
    if view["eval.problems"] is None:
        for key in ("eval.max_problems", "eval.max_new_tokens"):
            yield from no_effect(view, key, "eval.problems is not set")


def tracker(view: View) -> Iterator[Finding]:
    """The project is for Weights & Biases."""
    if view["tracker.wandb"] == "disabled":
        yield from no_effect(view, "tracker.wandb_project", "tracker.wandb is disabled; use tracker=wandb")


def tokenizer(view: View) -> Iterator[Finding]:
    """A tokenizer that is there already is not trained."""
    if view["tokenizer.path"] is not None:
        for key in ("tokenizer.vocab_size", "tokenizer.train_bytes", "tokenizer.special_tokens_for"):
            yield from no_effect(view, key, "the tokenizer of tokenizer.path is trained already", "tokenizer.path")


def reward(view: View) -> Iterator[Finding]:
    """Answers are judged where they are sampled; what judges them has a name and counts for something."""
    method = view["method.name"]
    if method not in SAMPLING:
        why = f"method={method} learns from answers that are judged already; method=ppo has its own judged"
        for key in ("reward_model", "reward_model_weight", "rewards"):
            yield from no_effect(view, key, why, "method.name")
        return
    functions, model = view["rewards"], view["reward_model"]
    if functions and model is None:
        why = "no reward_model is named, and beside rewards none is looked for"
        yield from no_effect(view, "reward_model_weight", why, "rewards")
    for name in functions:
        if not NAME.fullmatch(name) or name == "reward_model":
            taken = "is what the learned reward is called" if name == "reward_model" else "is not a name"
            yield finding(f"{name!r} {taken}; use letters, digits and . _ - =", f"rewards.{name}")
    weights = [each["weight"] for each in functions.values()]
    if not any(weights) and (view["reward_model_weight"] == 0 if model or not functions else functions):
        keys = [f"rewards.{name}.weight" for name in functions] or ["reward_model_weight"]
        yield finding("all weights are 0: nothing is rewarded", *keys)


def margins(view: View) -> Iterator[Finding]:
    """Pairs against sampled mistakes have no margin."""
    if view["objective.margin_weight"] and view["data.sampled_pairs"] is not None:
        problem = "every pair needs a margin, and those against sampled answers have none; set it to 0"
        yield finding(problem, "objective.margin_weight", "data.sampled_pairs")


def greedy(view: View) -> Iterator[Finding]:
    """Temperature 0 takes the likeliest token."""
    if 0 < view["temperature"] < LEAST_TEMPERATURE:
        problem = f"{view['temperature']} is too near to 0 to divide by: 0 takes the likeliest token"
        yield finding(f"{problem}; else it is at least {LEAST_TEMPERATURE}", "temperature")
    if view["temperature"] == 0:
        for key in ("top_k", "top_p"):
            yield from no_effect(view, key, "temperature=0 always takes the likeliest token", "temperature")


def pipeline_order(view: View) -> Iterator[Finding]:
    """A pipeline's stages are fed by earlier ones."""
    stages = view["stages"]
    earlier: dict[str, str] = {}
    if not stages:
        yield finding("needs at least one stage", "stages")
    for name, stage in stages.items():
        key = f"stages.{name}"
        if not NAME.fullmatch(name):
            yield finding(f"{name!r} is not a name of letters, digits and . _ - =", key)
        for role in ("model", "reward_model"):
            before = stage[role]
            if before is not None and before not in earlier:
                known = ", ".join(earlier) or "none"
                yield finding(f"{before!r} is no earlier stage; the earlier stages are: {known}", f"{key}.{role}")
        yield from _fed(name, stage, earlier)
        earlier[name] = stage["command"]


def _fed(name: str, stage: dict[str, object], earlier: dict[str, str]) -> Iterator[Finding]:
    command, before, judge = stage["command"], stage["model"], stage["reward_model"]
    if command != "pretrain" and before is None:
        yield finding("needs a value: the earlier stage whose model it starts from", f"stages.{name}.model")
    if before is not None and earlier.get(str(before)) == "reward":
        yield finding(f"{before!r} trains a reward model, which writes no text", f"stages.{name}.model")
    if judge is not None and command != "align":
        yield finding(f"has no effect: {command} asks no reward model", f"stages.{name}.reward_model")
    elif judge is not None and earlier.get(str(judge), "reward") != "reward":
        yield finding(f"{judge!r} trains no reward model", f"stages.{name}.reward_model")


def pipeline_overrides(view: View) -> Iterator[Finding]:
    """What the pipeline itself says is not said again for a stage."""
    for name, stage in {"": {"overrides": view["overrides"]}, **view["stages"]}.items():
        where = f"stages.{name}.overrides" if name else "overrides"
        for text in stage["overrides"]:
            key = text.lstrip("+").split("=")[0]
            if key in ("run", "runs_dir", "seed", "model.init_from", "reward_model"):
                yield finding(f"{text}: the pipeline's own keys (run, seed, model, ...) set {key}", where)


CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (
    shown_run,
    verified_run,
    *MODEL_CHECKS,
    *EXPERT_CHECKS,
    sequence_fits,
    architecture_from_folder,
    run_length,
    batch_size,
    whole_rows,
    rows_per_process,
    *LAYOUT_CHECKS,
    *PIPELINE_CHECKS,
    *CONTEXT_CHECKS,
    hanging,
    low_precision,
    found_rows,
    profile,
    schedule,
    warmup,
    length_warmup,
    best_checkpoint,
    *ADAPTER_CHECKS,
    *HEALTH_CHECKS,
    *SAVING_CHECKS,
    problems,
    tracker,
    tokenizer,
    *OBJECTIVE_CHECKS,
    reward,
    margins,
    *METHOD_CHECKS,
    *DATA_CHECKS,
    greedy,
    pipeline_order,
    pipeline_overrides,
)
