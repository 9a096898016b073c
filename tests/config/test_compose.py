"""Composing: order of the layers, round trip, pipelines, the user's own folders."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from llmtrain.config.compose import (
    COMMANDS,
    differences,
    load_config,
    read_yaml,
    stage_overrides,
    to_dict,
    to_yaml,
)
from llmtrain.config.errors import ConfigError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def test_result_is_typed_and_frozen() -> None:
    config = load_config("pretrain", ["optimizer.lr=3e-4", "optimizer.betas=[0.8,0.9]"])
    assert isinstance(config, COMMANDS["pretrain"])
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.betas == (0.8, 0.9)
    with pytest.raises(FrozenInstanceError):
        config.optimizer.lr = 1.0


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_keys_that_no_file_names_need_no_plus(prefix: str) -> None:
    assert load_config("sft", [f"{prefix}checkpoint.every_steps=7"]).checkpoint.every_steps == 7


@pytest.mark.parametrize("prefix", ["", "+"])
def test_experiment_wins_over_the_root_and_the_command_line_over_both(prefix: str) -> None:
    config = load_config("pretrain", [f"{prefix}experiment=quick"])
    assert (config.train.steps, config.schedule.warmup_steps) == (10, 2)
    assert load_config("pretrain", [f"{prefix}experiment=quick", "train.steps=11"]).train.steps == 11


def test_group_wins_over_the_root() -> None:
    # align.yaml says optimizer.lr, sgd.yaml says another
    assert load_config("align", ["optimizer=sgd"]).optimizer.lr == 0.1


@pytest.mark.parametrize("command", ["sft", "align"])
@pytest.mark.parametrize(
    ("data", "problems"),
    [
        ([], "embedded:arithmetic"),
        (["data.sources.arithmetic.max_rows=9"], "embedded:arithmetic"),
        (["data.sources.arithmetic.path=own.jsonl"], None),
        (["data=files", "data.sources.files.path=own.jsonl"], None),
        (["data=[arithmetic,files]", "data.sources.files.path=own.jsonl"], None),
        (["data=null", "data.sources.own.path=own.jsonl"], None),
    ],
)
def test_sums_are_problems_of_data_that_are_sums_alone(command: str, data: list[str], problems: str | None) -> None:
    write(Path("own.jsonl"), "{}\n")
    assert load_config(command, data).eval.problems == problems
    for said in (None, "embedded:arithmetic", "own.jsonl"):
        assert load_config(command, [*data, f"eval.problems={said or 'null'}"]).eval.problems == said


@pytest.mark.parametrize("text", ["optimizer=null", "~optimizer"])
def test_a_group_can_be_left_out(text: str) -> None:
    assert load_config("pretrain", [text]).optimizer.target == "torch.optim.AdamW"


def test_a_key_can_be_taken_back_to_its_default() -> None:
    assert load_config("pretrain", ["~schedule.warmup_steps"]).schedule.warmup_steps == 0


def test_a_length_on_the_command_line_replaces_the_one_of_the_root() -> None:
    config = load_config("pretrain", ["train.tokens=1_000_000"])
    assert (config.train.steps, config.train.tokens) == (None, 1_000_000)


def test_a_folder_to_start_from_replaces_the_default_architecture(tmp_path: Path) -> None:
    config = load_config("pretrain", [f"model.init_from={tmp_path}", "tokenizer.path=."])
    assert config.model.init_from == str(tmp_path)
    assert to_dict(config)["model"] == to_dict(COMMANDS["pretrain"](run="x", data=config.data))["model"] | {
        "init_from": str(tmp_path)
    }


@pytest.mark.parametrize(
    "prompt",
    ["What is 12 + 7?", "Hello, world (again): it's {me} [x]", "12", "a=b", "true", "'quoted' in part, so", "1e3"],
)
def test_text_is_taken_as_it_stands(prompt: str) -> None:
    assert load_config("generate", [f"prompt={prompt}"]).prompt == prompt


def test_quoted_text_loses_its_quotes() -> None:
    assert load_config("generate", ["prompt='a, b'"]).prompt == "a, b"
    assert load_config("generate", ["top_k=null", "model=null"]).model is None


@pytest.mark.parametrize("command", COMMANDS)
def test_yaml_round_trip(command: str, tmp_path: Path) -> None:
    config = load_config(command)
    write(tmp_path / "own" / "again.yaml", to_yaml(config))
    assert load_config(command, config_dirs=["own"], config_name="again") == config
    assert read_yaml("own/again.yaml") == to_dict(config)


@pytest.mark.parametrize("text", ["${not} an interpolation", "1e-3", "a: b # c", "\\${x}", "ä\nnew line", "null"])
def test_yaml_round_trip_of_text(text: str, tmp_path: Path) -> None:
    config = COMMANDS["generate"](prompt=text)
    write(tmp_path / "own" / "again.yaml", to_yaml(config))
    assert load_config("generate", config_dirs=["own"], config_name="again") == config


def test_part_of_the_yaml() -> None:
    config = load_config("pretrain")
    assert to_yaml(config, "schedule.name") == "cosine\n"
    assert to_yaml(config, "schedule").startswith("name: cosine\n")
    with pytest.raises(ConfigError, match=r"no key schedule\.x"):
        to_yaml(config, "schedule.x")


def test_differences_name_key_old_and_new() -> None:
    old = to_dict(load_config("pretrain"))
    new = to_dict(load_config("pretrain", ["optimizer.lr=0.5", "data.sources.code.weight=2"]))
    assert differences(old, old) == []
    assert differences(old, new) == ["optimizer.lr: 0.001 -> 0.5", "data.sources.code.weight: 0.25 -> 2.0"]
    assert differences({}, {"a": {"b": 1}}) == ["a: (not set) -> {'b': 1}"]


def test_stage_overrides_feed_the_earlier_stage() -> None:
    pipeline = load_config("pipeline", ["run=night", "runs_dir=out", "seed=5", "overrides=[tracker.every_steps=3]"])
    texts = stage_overrides(pipeline, "ppo")
    later = ("model.init_from", "reward_model")
    config = load_config("align", texts, later=later)
    assert (config.run, config.runs_dir, config.seed) == ("night/ppo", "out", 5)
    assert (config.model.init_from, config.reward_model) == ("out/night/sft", "out/night/reward")
    assert config.tracker.every_steps == 3
    assert config.method.name == "ppo"
    with pytest.raises(ConfigError, match="no such file or folder: out/night/sft"):
        load_config("align", texts)


@pytest.mark.parametrize(
    ("chosen", "names"),
    [("exact_answer", ["exact_answer"]), ("[exact_answer,format]", ["exact_answer", "format"]), ("null", [])],
)
def test_rewards_are_chosen_from_their_group_one_or_several(chosen: str, names: list[str]) -> None:
    assert list(load_config("align", ["method=ppo", f"rewards={chosen}"]).rewards) == names


def test_a_reward_of_a_group_is_changed_by_its_name() -> None:
    texts = ["rewards=[length,exact_answer]", "rewards.length.weight=0.1", "rewards.length.options.maximum=100"]
    rewards = load_config("align", ["method=ppo", *texts, "+rewards.mine={_target_:my.own,weight:2}"]).rewards
    assert {name: each.weight for name, each in rewards.items()} == {"length": 0.1, "exact_answer": 1.0, "mine": 2.0}
    assert rewards["length"].options == {"maximum": 100, "buffer": 0.2}
    assert rewards["mine"].target == "my.own"


@pytest.mark.parametrize("longest", ["", "method.max_new_tokens=8", "method={name:grpo,max_new_tokens:1024}"])
def test_the_length_that_is_punished_is_that_of_the_longest_answer(longest: str) -> None:
    config = load_config("align", ["method=grpo", "rewards=length", *filter(None, [longest])])
    assert config.rewards["length"].options["maximum"] == config.method.max_new_tokens


def test_a_pipeline_needs_a_reward_model_or_rewards() -> None:
    load_config("pipeline", ["stages.ppo.reward_model=null", "stages.ppo.overrides=[method=ppo,rewards=exact_answer]"])
    with pytest.raises(ConfigError, match=r"stages.ppo.reward_model: needs a value: .*or rewards=\.\.\."):
        load_config("pipeline", ["stages.ppo.reward_model=null"])


def test_faults_of_all_stages_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            "pipeline", ["stages.sft.overrides=[train.stepz=1]", "stages.dpo.overrides=[method=dpo,method.beta=-1]"]
        )
    message = str(caught.value)
    assert "sft: train.stepz: unknown key; did you mean train.steps?" in message
    assert "dpo: method.beta: -1 is not allowed; it takes a number > 0" in message


def test_own_folder_is_searched_before_the_packaged_one(tmp_path: Path) -> None:
    write(tmp_path / "configs" / "model" / "llama_tiny.yaml", "num_layers: 7\n")
    write(tmp_path / "configs" / "model" / "mine.yaml", "num_layers: 8\n")
    write(tmp_path / "more" / "model" / "mine.yaml", "num_layers: 9\n")
    assert load_config("pretrain").model.num_layers == 7
    assert load_config("pretrain", ["model=mine"]).model.num_layers == 8
    assert load_config("pretrain", ["model=mine"], config_dirs=["more"]).model.num_layers == 9


def test_own_group_of_a_block_that_has_no_default_option(tmp_path: Path) -> None:
    write(tmp_path / "configs" / "train" / "long.yaml", "steps: 12345\n")
    assert load_config("pretrain", ["train=long"]).train.steps == 12345


def test_experiment_chooses_groups_and_adds_differences(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /model: gpt2_tiny\ntrain:\n  tokens: 4096\n"
    write(tmp_path / "configs" / "experiment" / "mine.yaml", text)
    config = load_config("pretrain", ["experiment=mine"])
    assert (config.model.positions, config.train.tokens, config.train.steps) == ("learned", 4096, None)


def test_interpolations_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_RUN", "from-outside")
    config = load_config("pretrain", ["run=${oc.env:MY_RUN}", "eval.max_rows=${train.steps}"])
    assert (config.run, config.eval.max_rows) == ("from-outside", 300)


def test_files_group_takes_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "texts" / "a.jsonl", "{}\n")
    config = load_config("sft", ["data=files", "data.sources.files.path=texts/*.jsonl"])
    assert config.data.sources["files"].path == "texts/*.jsonl"


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("[method=ppo, train.steps=3]", ["method=ppo", "train.steps=3"]),
        ("[optimizer.betas=[0.8,0.9],seed_text='a, b']", ["optimizer.betas=[0.8,0.9]", "seed_text='a, b'"]),
        ("['a=1','b=2']", ["a=1", "b=2"]),
        ("[]", []),
    ],
)
def test_lists_of_overrides_need_no_quotes(value: str, texts: list[str]) -> None:
    assert load_config("show", [f"overrides={value}"]).overrides == texts
