"""Every kind of fault: which words its message has, and that all faults come together."""

from pathlib import Path

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LLMTRAIN_DATA", raising=False)


def message(command: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(command, list(overrides))
    assert caught.value.exit_code == 2
    return str(caught.value)


BAD = [
    # mixtures
    ("pretrain data.sources.prose.epochs=2", "data.sources.prose.weight: say how much in one way: prose has `epochs`"),
    ("pretrain data.temperature=2", "data.sources.prose.weight: has no effect: data.temperature shares out by size"),
    ("pretrain data.when_exhausted=stop", "data.when_exhausted: has no effect: no source has max_epochs"),
    ("pretrain data.phases=[{start:0.5,weights:{prosa:1}}]", "no source 'prosa'; did you mean prose?"),
    ("pretrain data.phases=[{start:0.5,weights:{prose:0}}]", "needs numbers >= 0, one of them larger"),
    ("pretrain data.phases=[{start:0.5,weights:{prose:inf}}]", "data.phases.0.weights.prose: inf is no finite number"),
    (
        "pretrain data.phases=[{start:0.5,weights:{prose:1}},{start:0.5,weights:{code:1}}]",
        "data.phases: phase 1 begins at 0.5, not after the one before",
    ),
    # cleaning
    (
        "pretrain data.cleaning.near_similarity=0.7",
        "near_similarity: has no effect: data.cleaning.near_duplicates is not",
    ),
    ("pretrain data.cleaning.decontaminate_ngram=8", "has no effect: data.cleaning.decontaminate is not set"),
    ("pretrain data.cleaning.c4_min_sentences=4", "c4_min_sentences: has no effect: data.cleaning.c4 is not set"),
    (
        "pretrain data.cleaning.mask_pii=[mail] data.cleaning.phone_region=DE",
        "data.cleaning.phone_region: has no effect: data.cleaning.mask_pii does not name phone",
    ),
    (
        "pretrain data.cleaning.c4=true data.sources.prose.cleaning.c4_min_sentences=4",
        "data.sources.prose.cleaning.c4_min_sentences: has no effect: data.sources.prose.cleaning.c4 is not set",
    ),
    ("pretrain data.cleaning.mask_pii=[mail,fax]", "data.cleaning.mask_pii.1: 'fax' it takes mail, ip or phone"),
    ("pretrain data.cleaning.bad_words=words.txt", "data.cleaning.bad_words: no such file: words.txt"),
    ("pretrain data.cleaning.decontaminate=[eval/*.jsonl]", "decontaminate: no file matches eval/*.jsonl"),
    ("pretrain data.sources.prose.cleaning.decontaminate=[./x]", "prose.cleaning.decontaminate: no such file: ./x"),
    ("pretrain data.cleaning.decontaminate=[embedded:prose]", "'embedded:prose': nothing embedded here"),
    ("sft data.cleaning.c4=true", "data.cleaning: unknown key"),
    # rows
    ("reward data.loss_on=last", "data.loss_on: has no effect: only sft learns conversations"),
    ("align data.too_long=split", "data.too_long: only conversations (sft) can be divided; use drop or cut"),
    ("sft data.sources.arithmetic.columns.prompt=q", "columns: has no effect: embedded:arithmetic is generated"),
    ("sft data.sources.arithmetic.columns.promt=q", "columns.promt: unknown key; did you mean columns.prompt?"),
    ("sft data.sources.arithmetic.templates=[{prompt:x}]", "templates: template 0 needs `completion` for sft"),
    ("reward data.sources.arithmetic.templates=[{prompt:x,completion:y}]", "template 0 needs `chosen` for reward"),
    (
        "sft data.sources.a.path=. data.sources.a.templates=[{prompt:x,completion:y}] data.sources.a.columns.prompt=q",
        "data.sources.a.columns: has no effect: the templates read the row's columns themselves",
    ),
    # keys
    ("pretrain optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean optimizer.lr? the override optimizer.lrr=1"),
    ("pretrain +optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
    ("pretrain ++modle.dim=3", "modle: unknown key; did you mean model? the override ++modle.dim=3"),
    ("pretrain lr=3", "lr: unknown key; did you mean optimizer.lr?"),
    ("pretrain train.learning_rate=3", "did you mean optimizer.lr?"),
    ("pretrain train.warmup_steps=3", "did you mean schedule.warmup_steps?"),
    ("pretrain zzz=3", "zzz: unknown key; there are the keys run, runs_dir"),
    ("align method.bete=3", "method.bete: unknown key; did you mean method.beta?"),
    ("align method.kl_target=3", "method.kl_target: unknown key"),
    ("pretrain optimizer.lr.x=3", 'optimizer.lr: {"x": 3} is not allowed'),
    ("align optimizer.lr.x=3", "optimizer.lr is a single value"),
    ("pipeline train.steps=3", "train: unknown key, a stage's: overrides=[train...=VALUE]"),
    # types and bounds
    ("pretrain train.steps=abc", "train.steps: 'abc' is not allowed; it takes a whole number >= 1, or null"),
    ("pretrain train.tokens=1e9", "1000000000.0 is not allowed whole number write 1000000000"),
    ("pretrain optimizer.lr='0.1'", "'0.1' is not allowed; it takes a number > 0; write 0.1 without quotes"),
    ("pretrain optimizer.lr=-1", "-1 is not allowed; it takes a number > 0"),
    ("pretrain optimizer.lr=inf", "optimizer.lr: inf is no finite number"),
    ("pretrain model.bias=3", "model.bias: 3 is not allowed; it takes true or false"),
    ("pretrain model.bias=null", "model.bias: null is not allowed"),
    ("pretrain model.dropout=1", "it takes a number >= 0 and < 1"),
    ("pretrain engine.compile=7", "engine.compile: 7 is not allowed; it takes true or false or auto"),
    ("pretrain optimizer.betas=[0.9]", "optimizer.betas.1: needs a value"),
    ("pretrain train=3", "train: 3 is not allowed; it takes a block with the keys steps, tokens"),
    ("pretrain seed=true", "seed: true is not allowed; it takes a whole number >= 0"),
    # words
    ("pretrain engine.precision=bf16", "it takes float32, bfloat16, float16 or float8; did you mean bfloat16?"),
    ("pretrain schedule.name=cosin", "schedule.name: 'cosin' did you mean cosine?"),
    ("align method.name=dppo", "method: 'dppo': method.name wants dpo or ipo or hinge did you mean"),
    # groups
    (
        "pretrain model=llama_tny",
        "model: no option llama_tny; did you mean llama_tiny? The options are bench_a, bench_b",
    ),
    ("pretrain +experiment=quikc", "experiment: no option quikc; did you mean quick?"),
    ("reward tokenizer=bpe", "tokenizer: llmtrain reward has no such group The groups are data, engine"),
    ("generate schedule=cosine", "schedule: llmtrain generate has no such group"),
    ("sft tokenizer=bpe", "tokenizer.vocab_size: unknown key configs/tokenizer/bpe.yaml:2 (tokenizer=bpe)"),
    # grammar, missing values, interpolations
    ("pretrain a=[", "not of the form key=value `a=[`"),
    ("pretrain just_a_word", "not of the form key=value `just_a_word`"),
    ("pretrain optimizer.lr=1,2", "optimizer.lr: several values: a sweep needs -m"),
    ("pretrain ~optimizer.foo", "optimizer.foo: nothing to take back"),
    ("pretrain data=files", "data.sources.files.path: needs a value configs/data/files.yaml:5 (data=files)"),
    (
        "pretrain data.sources.x.weight=2",
        "data.sources.x.path: needs a value: text the override data.sources.x.weight=2",
    ),
    ("pretrain train.steps=${nope.x}", "train.steps: cannot be resolved: Interpolation key 'nope.x' not found"),
    ("pretrain data=pile_like", "data.sources.books.path: cannot be resolved LLMTRAIN_DATA pile_like.yaml:"),
    # shapes
    ("pretrain model.num_heads=3", "model.num_heads: 3 does not divide model.hidden_size=128"),
    ("pretrain model.num_kv_heads=3", "model.num_kv_heads: 3 does not divide model.num_heads=4"),
    ("pretrain model.hidden_size=132", "132 / 4 heads = 33 per head; rope needs an even number"),
    ("pretrain model=gpt2_tiny model.rope_theta=5", "model.rope_theta: has no effect"),
    ("pretrain train.sequence_length=1024", "train.sequence_length: 1024 is longer model.max_sequence_length=512"),
    # experts
    (
        "pretrain model.experts.num_experts=1",
        "model.experts.num_experts: 1 is not allowed; it takes a whole number >= 2",
    ),
    (
        "pretrain model.experts.num_experts=4 model.experts.experts_per_token=5",
        "model.experts.experts_per_token: 5 experts for each token are more than there are: model.experts.num_experts",
    ),
    (
        "pretrain model.experts.experts_per_token=1",
        "model.experts.normalise_weights: the weight of a single expert is always 1 then, and the router learns",
    ),
    (
        "pretrain model.experts.num_experts=2 model.experts.balance_bias_rate=0.1",
        "model.experts.balance_bias_rate: has no effect: a token goes through all of model.experts.num_experts=2",
    ),
    (
        "pretrain model.experts.first_layer=4",
        "model.experts.first_layer: no layer has experts: the last of model.num_layers=4 is 3, counted from 0",
    ),
    (
        "pretrain model.ffn_hidden_size=64 model.experts.ffn_hidden_size=32",
        "model.ffn_hidden_size: has no effect: no layer is dense",
    ),
    (
        "pretrain model=mixtral_tiny model.experts.capacity_group_tokens=64",
        "model.experts.capacity_group_tokens: has no effect: nothing is dropped; set model.experts.capacity_factor",
    ),
    (
        "pretrain model.experts.scores=sigmoid model.experts.z_loss=0.001",
        "model.experts.z_loss: has no effect: it holds down the normaliser of a softmax",
    ),
    (
        "pretrain model=switch_tiny train.sequence_length=128",
        "model.experts.capacity_group_tokens: 256 tokens are more than a row has",
    ),
    ("pretrain model.experts.top_k=2", "model.experts.top_k: unknown key"),
    ("sft model.experts.num_experts=4", "model.experts: has no effect: this stage starts from the newest finished run"),
    # length and batch
    ("pretrain train.tokens=8192 train.epochs=1", "the length of the run is said 2 times: train.tokens, train.epochs"),
    ("pretrain train.steps=null", "the length of the run is missing: give one of train.steps, train.tokens"),
    ("sft train.tokens_per_parameter=20", "train.tokens_per_parameter: is for pretrain only"),
    ("pretrain train.batch_rows=4", "train.batch_rows: has no effect: pretrain wants train.batch_tokens"),
    ("sft train.batch_tokens=4096", "train.batch_tokens: has no effect: sft wants train.batch_rows"),
    ("sft train.batch_rows=null", "train.batch_rows: needs a value"),
    ("pretrain train.batch_tokens=1000", "1000 is no multiple of train.sequence_length=256, as 768 and 1024 are"),
    ("pretrain engine.processes=3", "4096 tokens are 16 rows, which 3 processes cannot share evenly"),
    ("sft engine.processes=3", "16 rows cannot be shared evenly by 3 processes"),
    ("align method=ppo method.minibatches=3", "method.minibatches: 3 does not divide train.batch_rows=16"),
    ("align method=ppo method.minibatches=8 engine.processes=4", "minibatches of 2 rows evenly by 4 processes"),
    ("align method=grpo train.batch_rows=12", "method.samples_per_prompt: 8 does not divide train.batch_rows=12"),
    (
        "align method=rloo method.minibatches=3",
        "method.minibatches: 3 does not divide the 4 prompts of train.batch_rows=16",
    ),
    ("align method=online_dpo engine.processes=16", "8 prompts cannot be shared evenly by 16 processes"),
    ("align method=grpo method.minibatches=2 engine.processes=2", "minibatches of 1 prompts evenly by 2 processes"),
    ("pretrain engine.sharding=fsdp", "engine.sharding: has no effect: fsdp shards over processes and there is one"),
    # processes
    (
        "pretrain engine.processes=4 engine.tensor_parallel=3 model.num_heads=6",
        "engine.tensor_parallel=3 does not divide the number of processes, 4",
    ),
    (
        "pretrain model=llama_tiny engine.processes=8 engine.tensor_parallel=8 model.num_heads=4",
        "engine.tensor_parallel: 8 does not divide model.num_heads=4",
    ),
    (
        "pretrain engine.processes=4 engine.tensor_parallel=2",
        "with processes that take different rows it goes with engine.sharding=fsdp or hsdp",
    ),
    ("pretrain engine.processes=2 engine.tensor_parallel=2 model.dropout=0.1", "does not go with model.dropout=0.1"),
    ("pretrain engine.processes=2 engine.tensor_parallel=2 model.positions=alibi", "with model.positions=alibi"),
    ("pretrain model=mixtral_tiny engine.processes=2 engine.tensor_parallel=2", "experts go with"),
    ("sft adapter=lora engine.processes=2 engine.tensor_parallel=2", "engine.tensor_parallel: adapters are not shared"),
    ("pretrain engine.processes=2 engine.tensor_parallel=2 engine.sharding=fsdp", "engine.sharding: has no effect"),
    ("pretrain engine.processes=4 engine.sharding=hsdp", "engine.shard_processes: needs a value"),
    ("pretrain engine.processes=4 engine.sharding=hsdp engine.shard_processes=3", "engine.shard_processes=3 does not"),
    ("pretrain engine.processes=4 engine.sharding=hsdp engine.shard_processes=4", "use engine.sharding=fsdp"),
    ("pretrain engine.processes=4 engine.shard_processes=2", "ddp has no replicas of what is sharded"),
    ("pretrain engine.processes=2 engine.expert_parallel=2", "has no effect: the model has no experts"),
    (
        "pretrain model=mixtral_tiny engine.processes=4 engine.expert_parallel=4 model.experts.num_experts=6",
        "4 does not divide model.experts.num_experts=6",
    ),
    ("pretrain engine.cpu_offload=true engine.device=cpu", "engine.cpu_offload: has no effect: the CPU's memory"),
    ("pretrain engine.cpu_offload=true", "engine.cpu_offload: goes with engine.sharding=fsdp or hsdp"),
    (
        "pretrain model=mixtral_tiny engine.processes=4 engine.expert_parallel=2 engine.tensor_parallel=2",
        "engine.expert_parallel: does not go with engine.tensor_parallel",
    ),
    ("pretrain engine.processes=2 engine.pipeline_parallel=2", "a pipeline of 2 wants 2 at least: set it to 8"),
    ("reward engine.processes=2 engine.context_parallel=2", "engine.context_parallel"),
    # options without effect
    ("pretrain schedule.decay_steps=5", "schedule.decay_steps: has no effect: cosine has no final decay"),
    ("pretrain schedule=constant schedule.min_lr_ratio=0.5", "schedule.min_lr_ratio: has no effect"),
    ("pretrain schedule.warmup_steps=400", "400 steps of warm-up are longer than the run: train.steps=300"),
    ("pretrain checkpoint.best_metric=eval/loss", "checkpoint.best_metric: has no effect while checkpoint.keep_best=0"),
    ("pretrain checkpoint.final=best", "checkpoint.best_metric: needs a value: what checkpoint.final=best is best by"),
    (
        "pretrain checkpoint.final=best checkpoint.best_metric=eval/loss eval.every_steps=null",
        "checkpoint.best_metric: has no effect: nothing is measured on the way; set eval.every_steps",
    ),
    (
        "pretrain checkpoint.final=best checkpoint.best_metric=eval/loss",
        "checkpoint.final: best has nothing to choose from; set checkpoint.every_steps, to eval.every_steps=100 say",
    ),
    (
        "pretrain checkpoint.final=best checkpoint.best_metric=eval/loss checkpoint.every_steps=150",
        "checkpoint.every_steps: 150 is no multiple of eval.every_steps=100: checkpoint.final=best wants all measured",
    ),
    ("pretrain checkpoint.keep_best=2", "checkpoint.keep_best: has no effect: checkpoint.best_metric is not set"),
    (
        "pretrain checkpoint.best_metric=eval/loss checkpoint.keep_best=1 eval.every_steps=null",
        "checkpoint.best_metric: has no effect: nothing is measured on the way; set eval.every_steps",
    ),
    # warnings
    ("sft health.kl=5", "health.kl: has no effect: nothing is sampled here: it is for reinforcement learning"),
    ("sft health.held_out_metric=eval/x", "health.held_out_metric: has no effect: no policy is rewarded here"),
    ("reward health.overoptimised=0.1", "health.overoptimised: has no effect: no policy is rewarded here"),
    ("align health.kl=5", "health.kl: has no effect: nothing is sampled here"),
    (
        "align method=ppo health.loss_spike=null",
        "health.loss_spike: has no effect: only the loss on text is steady enough",
    ),
    ("pretrain health.stuck_loss=0.01", "health.stuck_loss: has no effect: nothing is learned from given pairs here"),
    (
        "align method=kto health.stuck_loss=0.01",
        "health.stuck_loss: has no effect: nothing is learned from given pairs",
    ),
    ("align method=online_dpo health.kl=5", "health.kl: has no effect: method=online_dpo does not measure it"),
    ("align method=online_dpo health.stop_on=[kl]", "health.stop_on: kl has no effect: method=online_dpo does not"),
    (
        "align method=rejection_sampling health.stop_on=[flat_groups,entropy]",
        "health.stop_on: entropy has no effect: method=rejection_sampling does not measure it",
    ),
    (
        "align method=rejection_sampling health.clip_fraction=null",
        "health.clip_fraction: has no effect: method=rejection_sampling does not measure it",
    ),
    (
        "align method=grpo method.kl_coefficient=0 health.stop_on=[kl]",
        "health.stop_on: kl has no effect: method.kl_coefficient=0 has no reference to measure it to",
    ),
    (
        "align method=rloo health.stop_on=[explained_variance]",
        "health.stop_on: explained_variance has no effect: method=rloo has no value model",
    ),
    (
        "align method=grpo health.clip_fraction=0.5",
        "health.clip_fraction: has no effect: a rollout is used for one update, whose ratio is 1",
    ),
    (
        "align method=ppo method.kl_limit=null health.stop_on=[updates]",
        "health.stop_on: updates has no effect: no method.kl_limit ends the updates of a rollout",
    ),
    ("align method=rloo health.updates=0.5", "health.updates: has no effect: a rollout is used for one update"),
    (
        "align method=ppo health.flat_groups=0.5",
        "health.flat_groups: has no effect: method=ppo samples one answer to each prompt",
    ),
    (
        "align method=ppo health.overoptimised=null health.held_out_metric=eval/x",
        "health.held_out_metric: has no effect: health.overoptimised is switched off",
    ),
    ("sft health.grad_norm=[10,0.1]", "health.grad_norm: [10, 0.1] is no range: the lower limit comes first"),
    ("sft health.stop_on=[loss_spke]", "health.stop_on.0: 'loss_spke' it takes loss_spike did you mean loss_spike?"),
    (
        "align method=ppo train.micro_batch_rows=auto",
        "train.micro_batch_rows: auto is for updates alone, and method=ppo",
    ),
    (
        "align method=kto train.micro_batch_rows=auto",
        "train.micro_batch_rows: auto is for updates alone, and method=kto",
    ),
    (
        "align method.reference=precomputed train.micro_batch_rows=auto",
        "train.micro_batch_rows: auto is for updates alone, and method.reference=precomputed reads besides",
    ),
    ("sft train.micro_batch_rows=0", "train.micro_batch_rows"),
    ("align method=grpo engine.precision=float16", "engine.precision: float16 is not for method=grpo, which samples"),
    ("align engine.precision=float8", "engine.precision: float8 is for pretrain and sft; use bfloat16"),
    ("sft engine.precision=float8 adapter=lora", "engine.precision: float8 does not go with adapters; use bfloat16"),
    (
        "pretrain engine.precision=float8 engine.processes=2 engine.tensor_parallel=2",
        "engine.precision: float8 does not go with engine.tensor_parallel",
    ),
    (
        "pretrain engine.processes=2 engine.tensor_parallel=2 model.attention_sinks=true",
        "engine.tensor_parallel: does not go with model.attention_sinks=True: they belong to single heads",
    ),
    ("sft engine.float8_scaling=rowwise", "engine.float8_scaling: has no effect: nothing is scaled to float8"),
    ("sft engine.hang_minutes=5", "engine.hang_minutes: has no effect: there is one process"),
    ("sft health.spike_window=20", "health.spike_window: has no effect: health.on_spike is not set"),
    ("reward health.on_spike=skip", "health.on_spike: skip has no effect: only the loss on text is steady enough"),
    (
        "sft health.on_spike=rollback",
        "checkpoint.every_steps: needs a value: health.on_spike=rollback goes back to a checkpoint",
    ),
    (
        "sft health.on_spike=rollback checkpoint.every_steps=10 checkpoint.every_minutes=5",
        "checkpoint.every_minutes: leave it away with health.on_spike=rollback",
    ),
    ("sft health.stop_on=[kl]", "health.stop_on: kl has no effect: nothing is sampled here"),
    (
        "sft health.stop_on=[loss_spike] health.loss_spike=null",
        "health.stop_on: loss_spike is switched off: health.loss_spike=null",
    ),
    ("reward eval.problems=embedded:arithmetic", "eval.problems: has no effect: a reward model answers no problems"),
    ("pretrain eval.max_problems=3", "eval.max_problems: has no effect: eval.problems is not set"),
    ("pretrain tracker.wandb_project=x", "tracker.wandb_project: has no effect"),
    ("align reward_model=.", "reward_model: has no effect: method=dpo learns from answers that are judged"),
    ("align method=kto data.sampled_pairs.share=0.1", "data.sampled_pairs: has no effect: only reward and align"),
    (
        "align method=orpo method.sft_weight=1",
        "method.sft_weight: unknown key; method=orpo has the keys name, odds_ratio_weight",
    ),
    (
        "align method=simpo method.reference=precomputed",
        "method.reference: unknown key; method=simpo has the keys name, beta, gamma, sft_weight",
    ),
    ("align method=robust method.label_smoothing=0", "it takes a number > 0 and < 0.5"),
    # rewards
    ("align rewards=exact_answer", "rewards: has no effect: method=dpo learns from answers that are judged"),
    ("align reward_model_weight=2", "reward_model_weight: has no effect: method=dpo learns from answers that are"),
    ("align method=ppo rewards=exact", "rewards: no option exact; did you mean exact_answer?"),
    ("align method=ppo rewards=[format,lenght]", "rewards: no option lenght; did you mean length?"),
    ("align method=ppo rewards.mine.weight=2", "rewards.mine._target_: needs a value: text"),
    ("align method=ppo rewards=regex rewards.regex.wait=2", "rewards.regex.wait: unknown key"),
    ("align method=ppo rewards=regex rewards.regex.weight=inf", "rewards.regex.weight: inf is no finite number"),
    ("align method=ppo rewards={a-b/c:{_target_:x.y}}", "rewards.a-b/c: 'a-b/c' is not a name"),
    ("align method=ppo rewards={reward_model:{_target_:x.y}}", "'reward_model' is what the learned reward is called"),
    ("align method=ppo rewards=regex reward_model_weight=2", "reward_model_weight: has no effect: no reward_model"),
    ("align method=ppo rewards=regex rewards.regex.weight=0", "rewards.regex.weight: all weights are 0"),
    (
        "reward objective.margin_weight=1 data.sampled_pairs.share=0.5",
        "objective.margin_weight: every pair needs a margin, and those against sampled answers have none",
    ),
    ("reward objective.rankings=apart", "objective.rankings: 'apart' is not allowed; it takes whole or pairs"),
    ("reward center_rewards_coefficient=0.01", "unknown key; did you mean objective.centring_weight?"),
    ("align method=ppo reward_model_weight=0", "reward_model_weight: all weights are 0: nothing is rewarded"),
    ("align method=ppo method.kl_horizon=5", "method.kl_horizon: has no effect"),
    ("align method=ppo method.kl_coefficient=0 method.kl_target=3", "method.kl_target: has no effect: the KL counts"),
    ("align method=grpo method.kl_coefficient=0 method.unbiased_kl=false", "method.unbiased_kl: has no effect"),
    (
        "align method=grpo method.clip_range_high=0.28",
        "method.clip_range_high: has no effect: a rollout is used for one",
    ),
    ("align method=rloo method.kl_limit=0.2", "method.kl_limit: has no effect: a rollout is used for one update"),
    (
        "align method=ppo rewards=length method.value_model=reward_model",
        "method.value_model: there is no reward model to copy",
    ),
    (
        "align method=ppo method.value_model=shared method.value_warmup_steps=2",
        "method.value_warmup_steps: has no effect: values and policy share their weights",
    ),
    (
        "align method=ppo train.steps=30 method.value_warmup_steps=30",
        "method.value_warmup_steps: the policy would learn in none of 30 steps",
    ),
    ("align eval.best_of=4", "eval.best_of: has no effect: only align with method=ppo, grpo,"),
    (
        "align method=grpo eval.best_of=4 eval.problems=null",
        "eval.best_of: has no effect: set eval.problems or eval.max_prompts, for something to answer",
    ),
    ("sft tracker.samples=2", "tracker.samples: has no effect: only align with method=ppo, grpo,"),
    ("align tracker.samples_every_steps=5", "tracker.samples_every_steps: has no effect: only align with method=ppo,"),
    (
        "align method=ppo tracker.samples=0 tracker.samples_every_steps=5",
        "tracker.samples_every_steps: has no effect: tracker.samples=0 keeps none",
    ),
    ("align eval.max_prompts=4", "eval.max_prompts: has no effect: only align with method=ppo, grpo,"),
    ("sft eval.max_prompts=4", "eval.max_prompts: has no effect: only align with method=ppo, grpo,"),
    ("align rollout=vllm", "rollout.name: vllm has no effect: method=dpo samples nothing"),
    ("align method=grpo rollout=vllm engine=cpu", "rollout.name: vllm needs a GPU: set engine.device=cuda"),
    ("align method=ppo rollout=vllm method.temperature=3.0", "method.temperature: vLLM samples at 0.01 to 2.0; choose"),
    (
        "align method=online_dpo rollout=vllm rollout.importance_limit=3.0",
        "rollout.importance_limit: has no effect: method=online_dpo takes no ratio to the policy that sampled",
    ),
    ("align method=ppo rollout=vlm", "rollout: no option vlm; did you mean vllm?"),
    ("align method=ppo rollout.sleep=true", "rollout.sleep: unknown key"),
    ("align method=grpo data.sampled_pairs.share=0.1", "data.sampled_pairs: has no effect"),
    ("sft data.sampled_pairs.share=0.1", "data.sampled_pairs: has no effect: only reward and align method=dpo"),
    ("align method=ppo data.sampled_pairs.share=0.1", "data.sampled_pairs: has no effect"),
    ("reward data.packing=true", "data.packing: has no effect: reward trains on rows of their own; only sft packs"),
    ("align data.packing=true", "data.packing: has no effect: align trains on rows of their own"),
    (
        "sft train.length_warmup.start_length=64 train.length_warmup.steps=5",
        "train.length_warmup: has no effect: only pretrain cuts its rows",
    ),
    (
        "pretrain train.length_warmup.start_length=96 train.length_warmup.steps=5",
        "start_length: 96 does not become train.sequence_length=256 by doubling; use one of 128, 64",
    ),
    (
        "pretrain train.length_warmup.start_length=256 train.length_warmup.steps=5",
        "train.length_warmup.start_length: 256 does not become train.sequence_length=256 by doubling",
    ),
    (
        "pretrain train.length_warmup.start_length=64 train.length_warmup.steps=400",
        "train.length_warmup.steps: 400 steps of warm-up are longer than the run: train.steps=300",
    ),
    ("pretrain train.length_warmup.start_length=64", "train.length_warmup.steps: needs a value"),
    ("pretrain tokenizer.path=. tokenizer.vocab_size=999", "tokenizer.vocab_size: has no effect"),
    ("pretrain model.init_from=. model.num_layers=9", "model.num_layers: has no effect: the architecture comes with"),
    ("sft model.num_layers=9", "model.num_layers: has no effect: this stage starts from the newest finished run"),
    ("generate temperature=0 top_k=5", "top_k: has no effect: temperature=0 always takes the likeliest token"),
    # paths
    ("pretrain model.init_from=/no/such", "model.init_from: no such file or folder: /no/such"),
    ("align method=ppo reward_model=runs/rewrad", "reward_model: no such file or folder: runs/rewrad"),
    ("sft data=files data.sources.files.path=rows.jsonl", "data.sources.files.path: no such file: rows.jsonl"),
    ("sft data=files data.sources.files.path=rows/*", "data.sources.files.path: no file matches rows/*"),
    ("sft data.sources.arithmetic.validation_path=./v", "validation_path: no such file: ./v"),
    ("pretrain data.sources.x.path=embedded:poetry", "embedded here is embedded:prose, embedded:code"),
    ("generate model=nowhere", "model: no such file or folder: nowhere"),
    # names
    ("pretrain run=../x", "run: '../x' is not a name of letters, digits"),
    ("pretrain run=/abs", "run: '/abs' is not a name"),
    ("pretrain run=a//b", "run: 'a//b' is not a name"),
    # pipelines
    ("pipeline stages.sft.model=ppo", "stages.sft.model: 'ppo' is no earlier stage; the earlier stages are: pretrain"),
    ("pipeline stages.sft.model=null", "stages.sft.model: needs a value"),
    ("pipeline stages.ppo.reward_model=null", "stages.ppo.reward_model: needs a value"),
    ("pipeline stages.ppo.reward_model=sft", "stages.ppo.reward_model: 'sft' trains no reward model"),
    ("pipeline stages.dpo.model=reward", "stages.dpo.model: 'reward' trains a reward model"),
    ("pipeline stages.sft.reward_model=pretrain", "stages.sft.reward_model: has no effect"),
    ("pipeline stages.sft.overrides=[seed=3]", "stages.sft.overrides: seed=3: the pipeline's own keys"),
    ("pipeline stages.sft.command=stf", "stages.sft.command: 'stf' did you mean sft?"),
    ("pipeline overrides=[optimizer.lrr=1]", "reward: optimizer.lrr: unknown key"),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=[line for line, _ in BAD])
def test_message(line: str, words: str) -> None:
    """Each run of words is found, in this order."""
    text = message(*line.split(" "))
    flat = " ".join(text.split())
    position = 0
    for word in words.split(" "):
        found = flat.find(word, position)
        assert found >= 0, f"{word!r} of {words!r} is not in:\n{text}"
        position = found + len(word)


def test_all_faults_come_at_once_and_are_counted() -> None:
    text = message(
        "pretrain",
        "model=llama_tny",
        "optimizer.lrr=1",
        "train.steps=abc",
        "a=[",
        "run=../x",
        "data.sources.x.weight=${nope}",
        "schedule.decay_steps=3",
        "tokenizer.path=./none",
    )
    assert text.startswith("9 faults in the config of `llmtrain pretrain`")
    for number in range(1, 10):
        assert f"\n  {number}. " in text


def test_a_faulty_group_brings_no_faults_of_its_default_option() -> None:
    text = message("align", "method=ppoo", "method.kl_target=6.0")
    assert text.startswith("1 fault ")


def test_fault_in_a_file_names_file_and_line(tmp_path: Path) -> None:
    folder = tmp_path / "configs" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("num_layers: 2\n# a comment\nhidden_sise: 64\n")
    text = message("pretrain", "model=mine")
    assert "model.hidden_sise: unknown key; did you mean model.hidden_size?" in text
    assert "from configs/model/mine.yaml:3 (model=mine)" in text


def test_both_places_of_a_conflict_are_named() -> None:
    text = message("pretrain", "model.num_heads=3")
    assert "from the override model.num_heads=3 and " in text
    assert "configs/model/llama_tiny.yaml:" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [("num_layers: [1\n", "not valid YAML"), ("num_layers: 1\nnum_layers: 2\n", "duplicate"), ("- 1\n- 2\n", "")],
)
def test_broken_file_is_named(tmp_path: Path, content: str, words: str) -> None:
    folder = tmp_path / "configs" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(content)
    text = message("pretrain", "model=mine")
    assert words in text
    assert "mine" in text


def test_wrong_choice_inside_an_experiment(tmp_path: Path) -> None:
    folder = tmp_path / "configs" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /model: llama_tny\n")
    text = message("pretrain", "experiment=mine")
    assert "llama_tny" in text
    assert "did you mean llama_tiny?" in text


def test_nearest_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs" / "pretrain").mkdir(parents=True)
    assert "did you mean runs/pretrain?" in message("sft", "model.init_from=runs/pretrian")
    assert "did you mean runs/pretrain?" in message("sft", "model.init_from=pretrain")


def test_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert load_config("pretrain", ["engine.sharding=fsdp"]).engine.sharding == "fsdp"
    assert "engine.processes: leave at 1 here" in message("pretrain", "engine.processes=4")
    assert "by 4 processes" in message("sft", "train.batch_rows=6")


def test_layouts_that_go_together_are_taken() -> None:
    dense = ["engine.processes=4", "engine.sharding=fsdp", "engine.tensor_parallel=2"]
    assert load_config("pretrain", [*dense, "model=qwen3_tiny"]).engine.tensor_parallel == 2
    sparse = ["engine.processes=4", "engine.sharding=hsdp", "engine.shard_processes=2", "engine.expert_parallel=4"]
    assert load_config("pretrain", [*sparse, "model=mixtral_tiny"]).engine.expert_parallel == 4


OF_ALL_POLICIES = "entropy,length_growth,truncated,overoptimised,grad_norm"


@pytest.mark.parametrize(
    "line",
    [
        f"method=ppo method.kl_coefficient=0 health.stop_on=[{OF_ALL_POLICIES},kl,clip_fraction,explained_variance]",
        f"method=grpo method.minibatches=2 health.stop_on=[{OF_ALL_POLICIES},kl,clip_fraction,updates,flat_groups]",
        f"method=rloo method.epochs=2 health.stop_on=[{OF_ALL_POLICIES},kl,clip_fraction,flat_groups]",
        f"method=reinforce health.stop_on=[{OF_ALL_POLICIES},kl]",
        "method=online_dpo health.stop_on=[length_growth,truncated,flat_groups,overoptimised]",
        "method=rejection_sampling health.flat_groups=0.5 health.stop_on=[length_growth,truncated,flat_groups]",
        "method=orpo health.stuck_loss=0.01 health.stop_on=[stuck_loss,overoptimised]",
    ],
)
def test_warnings_that_the_method_can_give_are_taken(line: str) -> None:
    load_config("align", [*line.split(), "model.init_from=."])
