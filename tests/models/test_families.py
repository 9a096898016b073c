"""Each family against the Transformers library: what it writes is read here, and what is written here it reads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import MODELS, tiny_model
from torch import Tensor

from llmtrain.config.errors import UserError
from llmtrain.config.schema import ExpertsConfig, ModelConfig
from llmtrain.generation.decoder import Decoder
from llmtrain.models import layouts
from llmtrain.models.formats import load_language_model, load_scalar_model, read_config, save_model
from llmtrain.models.heads import LanguageModel, ScalarModel
from llmtrain.models.layouts.table import Key, Layout, Only, Rule, described

transformers = pytest.importorskip("transformers")

VOCAB_SIZE, LENGTH, WINDOW = 61, 24, 8
# Of logits between about -10 and 10.
TOLERANCE = 2e-5
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SIZES = {
    "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "vocab_size": VOCAB_SIZE, **TOKEN_IDS,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2_SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB_SIZE, **TOKEN_IDS}
MPT_SIZES = {"n_layers": 2, "d_model": 48, "max_seq_len": 64, "vocab_size": VOCAB_SIZE, **TOKEN_IDS}
BLOOM_SIZES = {"n_layer": 2, "hidden_size": 48, "vocab_size": VOCAB_SIZE, **TOKEN_IDS}
GEMMA = {**GROUPED, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "hidden_size": 40}
ORIGINAL = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 50.0}
QWEN3_MOE = {**GROUPED, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
# The name of the config class and its options; the sequences are three times as long as the windows.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2_SIZES),
    "llama 2": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "llama 3": ("Llama", {**GROUPED, "rope_parameters": LLAMA3}),
    "llama linear": ("Llama", {**GROUPED, "rope_parameters": LINEAR, "head_dim": 16}),
    "llama dynamic": ("Llama", {**GROUPED, "rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "llama yarn": ("Llama", {**GROUPED, "rope_parameters": {"rope_type": "yarn", **ORIGINAL}}),
    "llama biases": ("Llama", {**GROUPED, "attention_bias": True}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": WINDOW, "head_dim": 12}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2 window": ("Qwen2", {
        **GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1,
    }),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 16}),
    "gemma 2": ("Gemma2", GEMMA),
    "gemma 3": ("Gemma3Text", {
        **GEMMA, "num_hidden_layers": 7,
        "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL},
    }),
    "olmo 2": ("Olmo2", GROUPED),
    "phi 3": ("Phi3", {
        **GROUPED, "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    }),
    "pythia": ("GPTNeoX", SIZES),
    "gpt-neox sequential": ("GPTNeoX", {
        **SIZES, "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new",
    }),
    "gpt-bigcode": ("GPTBigCode", GPT2_SIZES),
    "falcon": ("Falcon", SIZES),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 5, "sliding_window": WINDOW}),
    "qwen3-moe": ("Qwen3Moe", {**QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3-moe, second layers": ("Qwen3Moe", {
        **QWEN3_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "use_sliding_window": True,
        "sliding_window": WINDOW,
    }),
    "qwen3-moe, dense first": ("Qwen3Moe", {**QWEN3_MOE, "mlp_only_layers": [0], "attention_bias": True}),
    "olmoe": ("Olmoe", {**GROUPED, "num_experts": 6, "num_experts_per_tok": 3}),
    "mpt": ("Mpt", {**MPT_SIZES, "n_heads": 4}),
    "mpt, 6 heads": ("Mpt", {**MPT_SIZES, "n_heads": 6}),
    "bloom": ("Bloom", {**BLOOM_SIZES, "n_head": 4}),
    "bloom, 6 heads": ("Bloom", {**BLOOM_SIZES, "n_head": 6}),
}  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES)
# Phi-3 without a window and without partial rotation is Llama to us; these stay what they are.
TYPES = {
    "gpt2": "gpt2", "llama 2": "llama", "llama 3": "llama", "llama dynamic": "llama", "mistral": "mistral",
    "qwen2": "qwen2", "qwen2 window": "qwen2", "qwen3": "qwen3", "gemma 2": "gemma2", "gemma 3": "gemma3_text",
    "olmo 2": "olmo2", "phi 3": "phi3", "pythia": "gpt_neox", "gpt-bigcode": "gpt_bigcode", "falcon": "falcon",
    "mpt": "mpt", "mixtral": "mixtral", "qwen3-moe": "qwen3_moe", "qwen3-moe, second layers": "qwen3_moe",
    "qwen3-moe, dense first": "qwen3_moe", "olmoe": "olmoe",
    "bloom": "bloom",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def drawn(model: Any, seed: int = 0) -> Any:
    """All weights drawn with a size that makes errors visible, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.25, generator=generator))
    return model.eval()


def their_model(case: str) -> Any:
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")(**options)
    return drawn(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def their_folder(case: str, folder: Path) -> Path:
    their_model(case).save_pretrained(folder)
    return folder


def padded_rows() -> tuple[Tensor, Tensor]:
    """Tokens [3, LENGTH] of rows of different lengths, and which count."""
    tokens = torch.randint(2, VOCAB_SIZE, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 7], [5]])


@torch.no_grad()
def largest_difference(ours: LanguageModel, theirs: Any) -> float:
    """Of the logits over the padded rows."""
    tokens, counts = padded_rows()
    expected = theirs(tokens, attention_mask=counts.long()).logits
    return float((ours.eval()(tokens) - expected)[counts].abs().max())


@EVERY
def test_what_transformers_writes_is_read(case: str, tmp_path: Path) -> None:
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    assert largest_difference(load_language_model(tmp_path), theirs) < TOLERANCE


@EVERY
def test_transformers_reads_what_is_written(case: str, tmp_path: Path) -> None:
    config, vocab_size = read_config(their_folder(case, tmp_path / "theirs"))
    ours = drawn(LanguageModel(config, vocab_size), seed=3)
    save_model(tmp_path / "ours", ours, extra_config=TOKEN_IDS)
    assert described(read_config(tmp_path / "ours")[0]) == described(config)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert largest_difference(ours, theirs.eval()) < TOLERANCE
    assert theirs.config.model_type == TYPES.get(case, theirs.config.model_type)


@EVERY
def test_the_round_trip_keeps_every_bit(case: str, tmp_path: Path) -> None:
    save_model(tmp_path / "ours", load_language_model(their_folder(case, tmp_path / "theirs")))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@torch.no_grad()
def cached_difference(ours: LanguageModel, theirs: Any, steps: int) -> float:
    """Of the logits token by token, rows of different lengths together here, each alone there."""
    tokens, _ = padded_rows()
    prompts = [row[:length].tolist() for row, length in zip(tokens, (3, 14, 7), strict=True)]
    added = torch.randint(2, VOCAB_SIZE, (3, steps), generator=torch.Generator().manual_seed(2))
    decoder = Decoder(ours)
    logits, cache = decoder.read_prompts(prompts)
    wide = decoder.new_cache([0] * 3, 14 + steps)
    wide.adopt(torch.arange(3), cache, torch.arange(3))
    found = [logits, *(decoder.read_tokens(added[:, step], wide) for step in range(steps))]
    worst = 0.0
    for row, prompt in enumerate(prompts):
        seen, past = torch.tensor([prompt]), None
        for step, of_rows in enumerate(found):
            output = theirs(seen, past_key_values=past, use_cache=True)
            worst = max(worst, float((output.logits[0, -1] - of_rows[row]).abs().max()))
            seen, past = added[row, [min(step, steps - 1)]][None], output.past_key_values
    return worst


@EVERY
def test_cached_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    assert cached_difference(load_language_model(tmp_path), theirs, steps=12) < TOLERANCE


@pytest.mark.parametrize("case", [
    "mistral", "qwen3", "gemma 3", "olmo 2", "phi 3", "pythia", "gpt-bigcode", "falcon",
    "mixtral", "qwen3-moe",
])  # fmt: skip
def test_score_models_both_ways(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")(**options, num_labels=1)
    theirs = drawn(transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_scalar_model(tmp_path / "theirs").eval()
    row = padded_rows()[0][:1]
    with torch.no_grad():
        torch.testing.assert_close(ours(row)[:, -1], theirs(row).logits[:, 0], atol=TOLERANCE, rtol=0)
        save_model(tmp_path / "ours", ours, extra_config=TOKEN_IDS)
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
        torch.testing.assert_close(again(row).logits, theirs(row).logits, atol=TOLERANCE, rtol=0)


# The rest is called as its family.
OURS = ("switch_tiny",)  # an encoder-decoder there
SHIPPED = {"gemma3": "gemma3_text", "pythia": "gpt_neox", "starcoder": "gpt_bigcode"}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OURS])
def test_what_is_shipped_is_written_as_its_family(name: str, tmp_path: Path) -> None:
    """Whatever vocabulary it was published with."""
    config, family = dataclasses.replace(tiny_model(name), published_vocab_size=99), name.removesuffix("_tiny")
    ours = drawn(LanguageModel(config, VOCAB_SIZE))
    save_model(tmp_path, ours, extra_config=TOKEN_IDS)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == SHIPPED.get(family, family)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert largest_difference(ours, theirs.eval()) < TOLERANCE
    assert described(read_config(tmp_path)[0]) == described(dataclasses.replace(config, published_vocab_size=None))


def test_gpt_neox_reads_both_names_of_the_head(tmp_path: Path) -> None:
    theirs = their_model("pythia")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("embed_out.weight", "lm_head.weight"):
        head = next(tensors.pop(each) for each in ("embed_out.weight", "lm_head.weight") if each in tensors)
        tensors[name] = head
        save_file(tensors, tmp_path / "model.safetensors")
        assert largest_difference(load_language_model(tmp_path), theirs) < TOLERANCE


def test_a_family_is_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up family: squared ReLU, scaled logits, sandwiched LayerNorms, its own names."""
    block = "net.{i}."
    made_up = Layout(
        model_type="made_up",
        language_class="MadeUpForCausalLM",
        scalar_class="MadeUpForSequenceClassification",
        ours={"norm": "layernorm", "norm_placement": "sandwich", "activation": "relu_squared", "bias": True},
        parts=(
            Key("depth", "num_layers"), Key("width", "hidden_size"), Key("heads", "num_heads"),
            Key("context", "max_sequence_length", 64), Key("logit_factor", "logit_scale", 1.0),
            Only("experts", 1),
        ),
        rules=(
            Rule("trunk.token_embedding", ("words",)), Rule("trunk.final_norm", ("last",)),
            Rule("trunk.blocks.{i}.attention.qkv", (block + "q", block + "k", block + "v")),
            Rule("trunk.blocks.{i}.attention.output", (block + "o",), transposed=True),
            Rule("trunk.blocks.{i}.feed_forward.up", (block + "up",)),
        ),
    )  # fmt: skip
    monkeypatch.setitem(layouts.LAYOUTS, "made_up", made_up)
    monkeypatch.setattr("llmtrain.models.layouts.LAYOUTS", {"made_up": made_up, **layouts.LAYOUTS})
    config = ModelConfig(
        num_layers=2, hidden_size=32, max_sequence_length=64, norm="layernorm", norm_placement="sandwich",
        activation="relu_squared", bias=True, logit_scale=0.5,
    )  # fmt: skip
    model = drawn(LanguageModel(config, VOCAB_SIZE))
    save_model(tmp_path, model)
    assert json.loads((tmp_path / "config.json").read_text())["logit_factor"] == 0.5
    assert "net.1.k.bias" in load_file(tmp_path / "model.safetensors")
    tokens = padded_rows()[0]
    torch.testing.assert_close(load_language_model(tmp_path)(tokens), model(tokens), atol=0, rtol=0)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("{", '{"experts": 8,', 1))
    with pytest.raises(UserError, match="experts=8 \\(supported: 1\\)"):
        read_config(tmp_path)


LLAMA = ModelConfig(num_layers=2, hidden_size=32, max_sequence_length=64)
COMBINED = {
    "alibi and a gate": {"positions": "alibi"},
    "no positions": {"positions": "none"},
    "softcap alone": {"attention_softcap": 20.0},
    "sinks": {"attention_sinks": True},
    "scaled logits": {"logit_scale": 0.25},
    "window and norms": {"sliding_window": 8, "norm_placement": "reordered"},
    "scaled rotation and part of it": {"partial_rotary_factor": 0.5, "qk_norm": "head"},
    "post norms": {"norm_placement": "post"},
    "experts beside a shared one": {"experts": ExpertsConfig(num_experts=4, shared_experts=1)},
    "experts and biases": {"experts": ExpertsConfig(num_experts=4), "bias": True},
}


@pytest.mark.parametrize("changes", COMBINED.values(), ids=COMBINED.keys())
def test_what_no_family_has_is_saved_as_ours(changes: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, **changes)
    model = drawn(LanguageModel(config, VOCAB_SIZE))
    save_model(tmp_path, model)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], "only llmtrain reads" in written["note"]) == ("llmtrain", True)
    assert read_config(tmp_path)[0] == config
    loaded = load_language_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_score_models_of_our_own_layout(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, positions="alibi", sliding_window=8, attention_pattern=["sliding", "full"])
    model = drawn(ScalarModel(config, VOCAB_SIZE))
    save_model(tmp_path, model)
    tokens = padded_rows()[0]
    torch.testing.assert_close(load_scalar_model(tmp_path)(tokens), model(tokens), atol=0, rtol=0)


REFUSED = {
    "llama": ("llama 3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_type='longrope'"),
    "yarn": ("llama yarn", {"rope_parameters": {
        "rope_type": "yarn", "factor": 2.0, "rope_theta": 10.0, "mscale": 0.7,
    }}, "mscale=0.7"),
    "partial": ("llama 3", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "gemma": ("gemma 2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    "layers": ("gemma 3", {"layer_types": ["chunked_attention"] * 7}, "layer_types with chunked_attention"),
    "mpt": ("mpt", {"attn_config": {"alibi": False, "clip_qkv": 8.0}}, r"(?s)attn_config.alibi=False.*clip_qkv=8.0"),
    "falcon": ("falcon", {"new_decoder_architecture": True}, "new_decoder_architecture=True"),
    "bigcode": ("gpt-bigcode", {"multi_query": False}, "multi_query=False"),
    "neox": ("pythia", {"hidden_act": "silu"}, "hidden_act='silu'"),
    "sparse layers": ("qwen3-moe", {"mlp_only_layers": [2]}, r"experts in layers \[0, 1\]"),
    "no sparse layer": ("qwen3-moe", {"decoder_sparse_step": 9}, "by which no layer has experts"),
    "no step": ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "changes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_family_has_beyond_us_is_named(case: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = their_folder(case, tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=words):
        read_config(tmp_path)
