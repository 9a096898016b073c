"""What is measured of a policy that samples, on prompts that are held out."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.test_preference import ARITHMETIC, run

from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import LoraConfig
from llmtrain.config.schema.reinforcement import PpoConfig, SampledAnswersConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.data.encoding import PromptRow
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.engine.tracking import read_metrics
from llmtrain.generation.sampler import generate
from llmtrain.models.formats import load_language_model, load_scalar_model, save_model
from llmtrain.models.heads import ActorCritic, LanguageModel, ScalarModel
from llmtrain.models.lora import AdaptedActorCritic, adapt
from llmtrain.rewards.rules import Length, Regex
from llmtrain.rewards.sums import WeightedSum
from llmtrain.stages import align, evaluators, reinforcement
from llmtrain.stages.assembly import AnyActorCritic
from llmtrain.stages.evaluators import BestOf, HeldOutPrompts, Problems
from llmtrain.stages.reinforcement import held_out_score, policy_weights

SETTINGS = SampledAnswersConfig(max_new_tokens=7)
REWARD = WeightedSum({"length": Length(maximum=9), "letter": Regex(pattern="[a-z]")}, {"length": 2.0, "letter": 0.0})


def held_out(parent: Path, seed: int, settings: SampledAnswersConfig = SETTINGS) -> HeldOutPrompts:
    tokenizer = load_tokenizer(parent)
    prompts = [PromptRow(tokenizer.encode(text), text, None) for text in ("What is 1?", "12 - 3", "The answer", "1 +")]
    model = load_language_model(parent).eval()
    return HeldOutPrompts(lambda: model, tokenizer, [*prompts, *prompts], REWARD, settings, seed)


def test_the_held_out_reward_is_that_of_each_answer_alone(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluators, "PORTION", 3)
    measure = held_out(parent, seed=5)
    values = measure()
    found = []
    for number, row in enumerate(measure.prompts):
        seeds = [derive_seed(5, "held-out prompt", number)]
        stops = set(measure.tokenizer.stop_ids)
        (tokens,) = generate(measure.model(), [row.tokens], max_new_tokens=7, stop_tokens=stops, seeds=seeds)
        text = measure.tokenizer.decode(tokens)
        letter = float(any("a" <= each <= "z" for each in text))
        found.append((2.0 * -min(1.0, len(tokens) / 9), letter, len(tokens), tokens[-1] not in stops))
    reward, letter, length, unfinished = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    assert 0 < letter < 1, "the test wants answers that differ"
    assert values == pytest.approx({
        "eval/reward": reward, "eval/final_reward": reward - unfinished, "eval/length/reward": reward / 2,
        "eval/letter/reward": letter,
        "eval/answer_tokens": length, "eval/unfinished": unfinished,
    }, rel=1e-6)  # fmt: skip
    assert measure() == values, "the same draws at every measurement"
    assert held_out(parent, seed=6)() != values


@pytest.mark.parametrize(
    ("options", "steps", "alone"),
    [({}, 20, 2), ({}, None, 2), ({}, 19, 0), ({"value_model": "shared"}, 90, 0), ({"value_warmup_steps": 5}, 9, 5),
     ({"value_warmup_steps": 0}, 90, 0)],
)  # fmt: skip
def test_a_value_model_learns_alone_at_first_where_there_is_time(
    options: dict[str, Any], steps: int | None, alone: int
) -> None:
    assert reinforcement.value_warmup(PpoConfig(**options), steps) == alone


def test_the_policy_stays_as_it_is_to_the_bit_while_the_value_model_learns_alone(parent: Path, tmp_path: Path) -> None:
    run(parent, tmp_path, "run", "method=ppo", "rewards=length", "method.max_new_tokens=4", "train.steps=3",
        "method.value_warmup_steps=2", "optimizer.lr=0.1", "optimizer.weight_decay=0.5", "checkpoint.every_steps=1",
        "checkpoint.keep_last=3")  # fmt: skip
    before = {f"model.policy.{name}": each for name, each in load_language_model(parent).named_parameters()}
    for step, rests in ((2, True), (3, False)):
        (file,) = (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").glob("state/*.safetensors")
        now = load_file(file)
        assert all(torch.equal(now[name], weight) for name, weight in before.items()) is rests, step


@pytest.mark.parametrize(("limit", "share"), [("1e-9", 0.5), ("null", 1.0)])
def test_the_share_of_updates_that_a_limit_leaves_is_told(
    parent: Path, tmp_path: Path, limit: str, share: float
) -> None:
    run(parent, tmp_path, "run", "method=ppo", "rewards=length", "method.max_new_tokens=4", f"method.kl_limit={limit}",
        "method.value_warmup_steps=0", "optimizer.lr=0.1", "train.steps=1")  # fmt: skip
    # the second of four has begun with a policy that has moved
    assert read_metrics(tmp_path / "run")[-1]["align/updates"] == share


def test_a_value_model_that_learns_alone_to_the_end_is_refused(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="value_warmup_steps: the policy would learn in none of 6 steps; lower it"):
        run(parent, tmp_path, "run", "method=ppo", "rewards=length", "method.max_new_tokens=4", "train.steps=null",
            "train.epochs=1", "method.value_warmup_steps=100")  # fmt: skip


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_weights_of_the_policy_are_told_from_those_of_the_value_model(parent: Path, adapter: str) -> None:
    policy = load_language_model(parent)
    if adapter == "lora":
        adapt(policy, LoraConfig(rank=2))
        trained: AnyActorCritic = AdaptedActorCritic(policy, LoraConfig(rank=2))
    else:
        trained = ActorCritic(policy, ScalarModel.from_language_model(policy, torch.Generator()))
    logits, values = trained(torch.arange(8).view(1, 8))
    found = []
    for output in (logits, values):
        trained.zero_grad()
        (output.sum() if output is values else output.square().mean()).backward(retain_graph=True)
        found.append({name for name, each in trained.named_parameters() if each.grad is not None})
    assert found[0] == {name for name in policy_weights(trained) if trained.get_parameter(name).requires_grad}
    assert not found[1] & {*policy_weights(trained)}
    assert found[1]


def test_a_run_measures_held_out_prompts_and_shows_their_answers(parent: Path, tmp_path: Path) -> None:
    talk = [
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "A number."},
         {"role": "user", "content": "Thanks"}] for n in range(8)
    ]  # fmt: skip
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"prompt": turns}) + "\n" for turns in talk))
    line = [
        "method=reinforce", "rewards=length", "method.max_new_tokens=4", "train.steps=1", "train.batch_rows=2",
        "schedule.warmup_steps=0", "eval.max_prompts=2", "eval.best_of=2", "data=files", "data.validation_every=3",
        f"data.sources.files.path={file}", f"model.init_from={parent}", f"runs_dir={tmp_path}",
    ]  # fmt: skip
    align.run(load_config("align", [*line, "run=a"]))
    rows = [json.loads(text) for text in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    for name in ("eval/reward", "eval/final_reward", "eval/best_of_2/reward"):
        assert [row["step"] for row in rows if name in row] == [0, 1], name
    samples = json.loads((tmp_path / "a" / "samples.json").read_text())
    asked = "<|user|>What is {}?<|assistant|>A number.<|end|><|user|>Thanks<|assistant|>"
    for moment in ("before", "after"):
        assert [each["prompt"] for each in samples[moment]] == [asked.format(2), asked.format(5)], moment
    assert "A number." in (tmp_path / "a" / "report.html").read_text()


def test_held_out_prompts_that_are_not_there_are_asked_for(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"prompt": "What is 1?"}\n')
    line = [
        "method=reinforce", "rewards=length", "method.max_new_tokens=4", "train.steps=1", "train.batch_rows=2",
        "schedule.warmup_steps=0", "eval.problems=null", "eval.max_prompts=2", "data=files",
        f"data.sources.files.path={tmp_path / 'one.jsonl'}", f"model.init_from={parent}", f"runs_dir={tmp_path}",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"eval.max_prompts: no prompt is held out; name some: data\.sources"):
        align.run(load_config("align", [*line, "run=b"]))


@pytest.mark.parametrize(("method", "best"), [(["method=ppo"], True), (["method=dpo"], False)])
def test_the_checkpoint_with_the_best_held_out_answers_is_handed_on(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: list[str], best: bool
) -> None:
    rewards = ["rewards=length", "method.max_new_tokens=4"] if best else []
    run(parent, tmp_path, "run", *method, *rewards, "train.steps=4", "eval.every_steps=2", "checkpoint.every_steps=2",
        "eval.problems=embedded:arithmetic", "eval.max_problems=2")  # fmt: skip
    assert ("best by eval/exact_match: step " in capsys.readouterr().err) is best


def with_dropout(folder: Path, copy: Path, load: Callable[..., LanguageModel | ScalarModel]) -> Path:
    """A copy of a model's folder that was trained with dropout."""
    shutil.copytree(folder, copy)
    save_model(copy, load(folder, dropout=0.2))
    return copy


def test_a_first_update_computes_what_has_sampled_whatever_dropout_was_before(
    parent: Path, reward_model: Path, tmp_path: Path
) -> None:
    start = with_dropout(parent, tmp_path / "start", load_language_model)
    judge = with_dropout(reward_model, tmp_path / "judge", load_scalar_model)
    assert load_language_model(start).config.dropout == load_scalar_model(judge).config.dropout == 0.2
    updates = ["train.steps=1", "method.epochs=1", "method.minibatches=1", "eval.problems=null"]
    kept = [each for each in ARITHMETIC if not each.startswith(("eval.max_problems", "eval.max_new"))]
    line = [*kept, "method=ppo", f"reward_model={judge}", "method.max_new_tokens=8", "train.micro_batch_rows=3"]
    line += [f"model.init_from={start}", f"runs_dir={tmp_path}", "run=a"]
    align.run(load_config("align", [*line, *updates]))
    rows = [json.loads(text) for text in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["step"] == 1)
    assert first["train/ratio"] == first["train/ratio_max"] == first["train/ratio_min"] == 1.0
    assert first["align/kl"] == 0.0, "nor has the reference any"
    # the value model neither: half the squared error that the rollout has seen
    assert 2 * first["train/value_loss"] == pytest.approx(first["align/value_error"], rel=1e-6)


def test_policy_and_reference_are_one_at_the_start_of_dpo_too(parent: Path, tmp_path: Path) -> None:
    start = with_dropout(parent, tmp_path / "start", load_language_model)
    rows = run(start, tmp_path, "a", "method=dpo", "train.steps=1")
    assert rows[1]["train/log_ratio"] == 0.0
    assert rows[1]["train/loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_a_right_answer_tells_more_than_a_reward(parent: Path) -> None:
    prompts = held_out(parent, seed=0)
    problems = Problems(prompts.model, prompts.tokenizer, prompts.prompts, max_new_tokens=4)
    assert held_out_score([prompts, problems]) == "eval/exact_match"
    assert held_out_score([prompts]) == "eval/final_reward"
    assert held_out_score([]) is None


@pytest.mark.parametrize(
    ("options", "score"),
    [({}, "eval/final_reward"), ({"reward_clip": 0.5, "missing_eos_penalty": 0.0}, "eval/final_reward"),
     ({"missing_eos_penalty": 0.0}, "eval/reward")],
)  # fmt: skip
def test_checkpoints_are_ranked_by_what_is_learned_from(parent: Path, options: dict[str, float], score: str) -> None:
    measure = held_out(parent, seed=0, settings=SampledAnswersConfig(max_new_tokens=7, **options))
    values = measure()
    assert held_out_score([measure]) == score
    assert ("eval/final_reward" in values) is (score == "eval/final_reward")
    assert measure.score in values


def test_the_best_answer_is_chosen_by_what_is_learned_from_and_told_as_a_score(parent: Path) -> None:
    ending = SampledAnswersConfig(max_new_tokens=7, missing_eos_penalty=100.0)
    prompts = held_out(parent, seed=0)
    score = WeightedSum({"long": lambda answers: [float(len(each.tokens)) for each in answers]}, {"long": 1.0})
    asked = (prompts.model, prompts.tokenizer, prompts.prompts, score)
    plain, calm = (BestOf(*asked, settings, 6, seed=3)() for settings in (SETTINGS, ending))
    assert plain.keys() == calm.keys() == {"eval/best_of_6/reward"}
    assert 0 < calm["eval/best_of_6/reward"] < plain["eval/best_of_6/reward"], "shorter ones, which have ended"


@pytest.mark.parametrize(("answers", "told"), [(["3", "9"], True), (["3", None], False)])
def test_right_answers_among_the_best_are_counted_where_all_prompts_have_one(
    parent: Path, answers: list[str | None], told: bool
) -> None:
    prompts = held_out(parent, seed=0)
    rows = [PromptRow(prompts.prompts[0].tokens, "What is 1?", answer) for answer in answers]
    values = BestOf(prompts.model, prompts.tokenizer, rows, REWARD, SETTINGS, 2, seed=3)()
    assert ("eval/best_of_2/exact_match" in values) is told
