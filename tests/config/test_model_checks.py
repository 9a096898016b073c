"""What is said of architectures before anything is built."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import Llama3ScalingConfig, YarnScalingConfig

YARN = "{name:yarn,factor:4,original_max_sequence_length:128}"
MUP = "{name:mup,base_hidden_size:64,base_head_dim:32}"
CASES = {
    "heads": (["num_heads=3"], "model.num_heads: 3 does not divide model.hidden_size=128; change one, or give"),
    "head_dim": (["head_dim=9"], "model.head_dim: 9 per head; rope needs an even number"),
    "part": (["partial_rotary_factor=0.1"], "32 per head, of which 0.1 are 3; rope needs an even number"),
    "no frequencies": (
        ["positions=alibi", "rope_theta=5.0", "partial_rotary_factor=0.5"],
        "model.partial_rotary_factor: has no effect: model.positions=alibi has no frequencies",
    ),
    "no rotation to scale": (
        ["positions=none", f"rope_scaling={YARN}"],
        "model.rope_scaling: has no effect: model.positions=none has no frequencies",
    ),
    "kind of scaling": (["rope_scaling={name:yran,factor:2}"], "did you mean yarn?"),
    "key of scaling": (
        ["rope_scaling={name:linear,factor:2,beta_fast:3}"],
        "model.rope_scaling.beta_fast: unknown key",
    ),
    "lacking": (["rope_scaling={name:llama3,factor:2}"], "original_max_sequence_length: needs a value"),
    "shrinking": (["rope_scaling={name:linear,factor:0.5}"], "0.5 is not allowed; it takes a number > 1"),
    "order": (
        ["rope_scaling={name:yarn,factor:4,original_max_sequence_length:128,beta_slow:40}"],
        "model.rope_scaling.beta_slow: 40 is not below model.rope_scaling.beta_fast=32",
    ),
    "dynamic": (
        ["rope_scaling={name:dynamic,factor:4,original_max_sequence_length:128}"],
        "train.sequence_length: 256 is longer than model.rope_scaling.original_max_sequence_length=128",
    ),
    "pattern without window": (
        ["attention_pattern=[sliding,full]"],
        "model.attention_pattern: has no effect: no layer has a window: give model.sliding_window",
    ),
    "local base": (["rope_local_theta=5.0"], "model.rope_local_theta: has no effect: no layer has a window"),
    "long window": (["sliding_window=512"], "has no effect: 512 positions are all of model.max_sequence_length=512"),
    "no sliding layer": (
        ["sliding_window=64", "attention_pattern=[full]"],
        "model.sliding_window: has no effect: no layer is sliding",
    ),
    "long pattern": (
        ["sliding_window=64", "attention_pattern=[sliding,full,full,full,full]"],
        "model.attention_pattern: has 5 entries for model.num_layers=4",
    ),
    "kind of layer": (
        ["sliding_window=64", "attention_pattern=[local]"],
        "'local' is not allowed",
    ),
    "empty pattern": (["sliding_window=64", "attention_pattern=[]"], "model.attention_pattern"),
    "parallel": (
        ["block=parallel", "norm_placement=sandwich"],
        "model.norm_placement: sandwich does not go with model.block=parallel",
    ),
    "bias of a norm": (["norm_bias=true"], "model.norm_bias: has no effect: model.norm=rmsnorm has no biases"),
    "sines": (
        ["positions=sinusoidal", "num_heads=1", "hidden_size=33"],
        "model.hidden_size: 33 is odd; sinusoidal positions are pairs",
    ),
    "scale": (["embedding_scale=-1.0"], "model.embedding_scale: -1.0 is not above 0"),
    "deviation said twice": (
        ["init.name=scaled", "init_std=0.1"],
        "model.init_std: has no effect: scaled says how large weights are by their shapes",
    ),
    "experts of a deeper encoder": (
        ["architecture=encoder_decoder", "encoder_layers=6", "experts.first_layer=6"],
        "model.experts.first_layer: no layer has experts: the last of model.encoder_layers=6 is 5, counted from 0",
    ),
    "room in a decoder": (
        ["architecture=encoder_decoder", "experts.capacity_factor=1.0", "experts.capacity_group_tokens=64"],
        "model.experts.capacity_group_tokens: 64 tokens are more than the 58 that the decoder reads of",
    ),
    "queries that are scaled twice": (
        ["init.name=t5", "tied_embeddings=false"],
        "model.init.name: t5 has the scale of attention's scores in the queries' weights: set model.attention_scale=1",
    ),
    "head as large as embeddings": (
        ["init.name=t5", "attention_scale=1.0"],
        "and one is the head: set model.logit_scale=0.08839, which is 1 / sqrt(model.hidden_size=128), or model.tied",
    ),
    "routers": (
        [f"init={MUP}", "experts.num_experts=4"],
        "model.init.name: mup has no rule for the routers of experts",
    ),
    "base model": (["init.name=mup"], "model.init.base_head_dim: needs a value: a whole number >= 1"),
    "key of another kind": (["init.name=small", "init.zero_head=true"], "model.init.zero_head: unknown key"),
    "zero head": (
        [f"init={MUP}", "init.zero_head=true"],
        "model.init.zero_head: the head is the embedding, which is not to be zero; set model.tied_embeddings=false",
    ),
    "zero query": (
        [f"init={MUP}", "init.zero_query=true", "qk_norm=full"],
        "model.init.zero_query: queries of zero cannot be normalised",
    ),
    "all rows past all branches": (["stochastic_depth=1.0"], "it takes a number >= 0 and < 1"),
    "encoder's layers": (
        ["encoder_layers=2"],
        "model.encoder_layers: has no effect: model.architecture=decoder has no encoder beside a decoder",
    ),
    "segments of a decoder": (
        ["num_segments=2"],
        "model.num_segments: has no effect: it is for model.architecture=encoder, not decoder",
    ),
    "parts of an encoder": (
        ["architecture=encoder_decoder", "mlm_head=true", "pooler=true"],
        "model.pooler: has no effect: it is for model.architecture=encoder, not encoder_decoder",
    ),
    "no place for cross-attention": (
        ["architecture=encoder_decoder", "block=parallel"],
        "model.block: parallel leaves no place for cross-attention",
    ),
    "relative positions turn nothing": (
        ["positions=relative", "rope_theta=5.0"],
        "model.rope_theta: has no effect: model.positions=relative has no frequencies",
    ),
    "no buckets": (
        ["relative_buckets=16"],
        "model.relative_buckets: has no effect: model.positions=rope has no buckets",
    ),
    "buckets": (["positions=relative", "relative_buckets=18"], "model.relative_buckets: 18 is no multiple of 4"),
    "near and far": (
        ["positions=relative", "relative_max_distance=16"],
        "model.relative_max_distance: 16 is not above 16, the distances with buckets of their own",
    ),
    "no table": (["position_offset=2"], "model.position_offset: has no effect: model.positions=rope has no table"),
    "norm of the first block": (
        ["embedding_norm=first", "norm_placement=post"],
        "model.embedding_norm: first is in the place of a norm that model.norm_placement=post has not",
    ),
    "kind of network": (["architecture=encoder-decoder"], "did you mean encoder_decoder?"),
    "scale in words": (["embedding_scale=sqrt"], "'sqrt' is not allowed; it takes a number or sqrt_hidden_size"),
}


@pytest.mark.parametrize("case", CASES)
def test_faults(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes, message = CASES[case]
    with pytest.raises(ConfigError) as raised:
        load_config("pretrain", [f"model.{change}" for change in changes])
    assert message in " ".join(str(raised.value).split())


def test_faults_are_told_together() -> None:
    changes = ["positions=alibi", "rope_theta=5.0", "sliding_window=512", "block=parallel", "norm_placement=post"]
    with pytest.raises(ConfigError) as raised:
        load_config("pretrain", [f"model.{change}" for change in changes])
    for key in ("rope_theta", "sliding_window", "norm_placement"):
        assert f"model.{key}" in str(raised.value)


def test_mup_has_rules_for_adamw() -> None:
    assert load_config("pretrain", [f"model.init={MUP}"]).model.width_ratio == 2.0
    with pytest.raises(ConfigError) as raised:
        load_config("pretrain", [f"model.init={MUP}", "optimizer=sgd"])
    problem = "optimizer._target_: model.init.name=mup has its learning rates for torch.optim.AdamW only"
    assert problem in " ".join(str(raised.value).split())


def test_scalings_are_chosen_by_name() -> None:
    config = load_config("pretrain", [f"model.rope_scaling={YARN}", "model.rope_scaling.beta_fast=16"])
    assert config.model.rope_scaling == YarnScalingConfig(factor=4, original_max_sequence_length=128, beta_fast=16)
    llama3 = ["name=llama3", "factor=8.0", "original_max_sequence_length=256"]
    config = load_config("pretrain", [f"model.rope_scaling.{option}" for option in llama3])
    assert config.model.rope_scaling == Llama3ScalingConfig(factor=8.0, original_max_sequence_length=256)


def test_torch_is_not_imported_to_find_them() -> None:
    script = (
        "import sys\nfrom llmtrain.config.compose import load_config\n"
        "try:\n    load_config('pretrain', ['model.sliding_window=512'])\n"
        "except Exception as error:\n    print(type(error).__name__, 'torch' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["ConfigError", "False"]
