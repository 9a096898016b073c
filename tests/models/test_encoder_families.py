"""BERT, RoBERTa, ModernBERT, T5 and Switch against the Transformers library: what each writes the other reads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import ENCODERS, tiny_model
from torch import Tensor, nn

from llmtrain.config.errors import UserError
from llmtrain.config.schema import ExpertsConfig, ModelConfig
from llmtrain.generation.decoder import SourceDecoder
from llmtrain.generation.sampler import generate
from llmtrain.models.formats import load_language_model, load_scalar_model, read_config, save_model
from llmtrain.models.heads import EncoderDecoder, LanguageModel, make_model
from llmtrain.models.layouts.table import described

transformers = pytest.importorskip("transformers")

VOCAB_SIZE, LENGTH = 61, 24
# Of logits between about -2 and 2, and states between about -4 and 4.
TOLERANCE = 1e-5
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
SIZES = {
    "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "vocab_size": VOCAB_SIZE, **TOKEN_IDS,
}  # fmt: skip
MODERN = {**SIZES, "num_hidden_layers": 7, "local_attention": 10, "cls_token_id": 0, "sep_token_id": 2}
T5 = {
    "d_model": 40, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "vocab_size": VOCAB_SIZE, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
    "decoder_start_token_id": 1, **TOKEN_IDS,
}  # fmt: skip
SWITCH = {**T5, "num_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1, "num_experts": 3}
# The class of the model, the one of its config, and its options.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "bert with a pooler": ("BertForPreTraining", "BertConfig", SIZES),
    "bert with another function": ("BertForMaskedLM", "BertConfig", {**SIZES, "hidden_act": "gelu_new"}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**SIZES, "type_vocab_size": 1}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", MODERN),
    "modernbert with biases": ("ModernBertForMaskedLM", "ModernBertConfig", {
        **MODERN, "norm_bias": True, "mlp_bias": True, "classifier_bias": True, "attention_bias": True,
    }),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5 v1.1": ("T5ForConditionalGeneration", "T5Config", {
        **T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }),
    "switch": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", SWITCH),
    "switch of experts alone": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", {
        **SWITCH, "num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 3, "dense_act_fn": "gelu_new",
    }),
}  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES)
EVERY_T5 = pytest.mark.parametrize("case", ["t5", "t5 v1.1", "switch"])
COUNTS = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 7], [5]])


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
    model_class, config_class, options = CASES[case]
    config = getattr(transformers, config_class)(**options, attn_implementation="eager")
    model = getattr(transformers, model_class)(config)
    if case == "t5 v1.1":  # this version of the library ties the head of a new model whatever its config says
        model.lm_head.weight = nn.Parameter(torch.empty(VOCAB_SIZE, T5["d_model"]))
    return drawn(model)


def their_folder(case: str, folder: Path) -> Path:
    their_model(case).save_pretrained(folder)
    return folder


def numbers(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def differences(ours: LanguageModel, theirs: Any) -> list[float]:
    """The largest ones of the logits, of the encoder's states, and with a pooler of its logits, over padded rows."""
    tokens, targets, found = numbers(3, LENGTH, 1), numbers(3, 9, 2), []
    if isinstance(ours, EncoderDecoder):
        lengths = COUNTS.sum(dim=1)
        expected = theirs(input_ids=tokens, attention_mask=COUNTS.long(), decoder_input_ids=targets)
        found.append(ours(targets, source=tokens, source_lengths=lengths) - expected.logits)
        states = ours.encode(tokens, lengths).states
        return largest([*found, (states - expected.encoder_last_hidden_state)[COUNTS]])
    config, documents, said, segments = ours.config, (~COUNTS).int(), {}, None
    if config.num_segments > 1:
        segments = (torch.arange(LENGTH) > 3).long().expand(3, -1)
        said["token_type_ids"] = segments
    # RoBERTa finds the padding, from which it counts its positions, by the number of its token
    tokens = torch.where(COUNTS, tokens, 1)
    expected = theirs(tokens, attention_mask=COUNTS.long(), output_hidden_states=True, **said)
    logits = ours(tokens, documents=documents, segments=segments, pooled=config.pooler)
    if config.pooler:
        logits, follows = logits
        found.append(follows - expected.seq_relationship_logits)
    their_logits = expected.prediction_logits if config.pooler else expected.logits
    states = ours.trunk(tokens, documents=documents, segments=segments)
    return largest([*found, (logits - their_logits)[COUNTS], (states - expected.hidden_states[-1])[COUNTS]])


def largest(tensors: list[Tensor]) -> list[float]:
    return [float(each.abs().max()) for each in tensors]


@EVERY
def test_what_transformers_writes_is_read(case: str, tmp_path: Path) -> None:
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    assert max(differences(load_language_model(tmp_path).eval(), theirs)) < TOLERANCE


@EVERY
def test_transformers_reads_what_is_written(case: str, tmp_path: Path) -> None:
    config, vocab_size = read_config(their_folder(case, tmp_path / "theirs"))
    ours = drawn(make_model(config, vocab_size), seed=3)
    save_model(tmp_path / "ours", ours, extra_config=TOKEN_IDS)
    assert described(read_config(tmp_path / "ours")[0]) == described(config)
    model_class = getattr(transformers, CASES[case][0])
    theirs, report = model_class.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert max(differences(ours, theirs.eval())) < TOLERANCE
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [model_class.__name__]


@EVERY
def test_the_round_trip_keeps_every_bit(case: str, tmp_path: Path) -> None:
    save_model(tmp_path / "ours", load_language_model(their_folder(case, tmp_path / "theirs")), extra_config=TOKEN_IDS)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@EVERY_T5
@torch.no_grad()
def test_cached_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    """Logits token by token, sources of different lengths together here, each alone there."""
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    ours, steps = load_language_model(tmp_path), 12
    assert isinstance(ours, EncoderDecoder)
    sources = [row[:length].tolist() for row, length in zip(numbers(3, LENGTH, 1), (LENGTH, 14, 3), strict=True)]
    added = numbers(3, steps, 2)
    decoder = SourceDecoder(ours, start_token=1)
    logits, cache = decoder.read_prompts(sources)
    wide = decoder.free_rows(3, [(LENGTH, steps)])
    wide.adopt(torch.arange(3), cache, torch.arange(3))
    found, worst = [logits, *(decoder.read_tokens(added[:, step], wide) for step in range(steps))], 0.0
    for row, source in enumerate(sources):
        encoded = theirs.encoder(torch.tensor([source]))
        output = theirs(encoder_outputs=encoded, decoder_input_ids=torch.tensor([[1]]), use_cache=True)
        for step, of_rows in enumerate(found):
            worst = max(worst, float((output.logits[0, -1] - of_rows[row]).abs().max()))
            if step < steps:
                output = theirs(
                    encoder_outputs=encoded, decoder_input_ids=added[row, step].view(1, 1), use_cache=True,
                    past_key_values=output.past_key_values,
                )  # fmt: skip
    assert worst < TOLERANCE


@EVERY_T5
def test_greedy_answers_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path)
    sources = [row[:length].tolist() for row, length in zip(numbers(3, LENGTH, 1), (LENGTH, 14, 3), strict=True)]
    answers = generate(
        load_language_model(tmp_path), sources, max_new_tokens=10, stop_tokens={2}, temperature=0.0, start_token=1
    )
    for source, answer in zip(sources, answers, strict=True):
        written = theirs.generate(torch.tensor([source]), max_new_tokens=10, do_sample=False, use_cache=False)
        assert written[0, 1:].tolist() == answer


# The class that reads what is shipped.
CLASSES = {
    "bert_tiny": "BertForMaskedLM",
    "modernbert_tiny": "ModernBertForMaskedLM",
    "t5_tiny": "T5ForConditionalGeneration",
    "switch_t5_tiny": "SwitchTransformersForConditionalGeneration",
}


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_shipped_is_written_as_its_family(name: str, tmp_path: Path) -> None:
    ours = drawn(make_model(tiny_model(name), VOCAB_SIZE))
    save_model(tmp_path, ours, extra_config=TOKEN_IDS)
    theirs, report = getattr(transformers, CLASSES[name]).from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert max(differences(ours, theirs.eval())) < TOLERANCE


def test_old_names_of_norms_and_heads_that_nobody_asks_for_are_read(tmp_path: Path) -> None:
    """As in the files of 2018: gamma and beta, the pooler and its head beside masked tokens, the tied matrix."""
    theirs = their_model("bert with a pooler")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("BertForPreTraining", "BertForMaskedLM"))
    ours = load_language_model(tmp_path).eval()
    assert not ours.config.pooler
    with torch.no_grad():
        found, expected = ours(numbers(3, LENGTH, 1)), theirs(numbers(3, LENGTH, 1)).prediction_logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_head_that_is_in_the_files_once_is_the_embedding(tmp_path: Path) -> None:
    theirs = their_model("t5 v1.1")
    theirs.lm_head.weight = theirs.shared.weight
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert max(differences(load_language_model(tmp_path).eval(), theirs)) < TOLERANCE


def test_experts_of_switch_take_whole_rows_in_evaluation(tmp_path: Path) -> None:
    """Theirs drop what is beyond `expert_capacity` there too; what is written has room for a row."""
    options = transformers.SwitchTransformersConfig(**SWITCH, expert_capacity=3, attn_implementation="eager")
    theirs = drawn(transformers.SwitchTransformersForConditionalGeneration(options))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_language_model(tmp_path / "theirs").eval()
    assert max(differences(ours, theirs)) > 1000 * TOLERANCE
    save_model(tmp_path / "ours", ours, extra_config=TOKEN_IDS)
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert again.config.expert_capacity == ours.config.max_sequence_length
    assert max(differences(ours, again.eval())) < TOLERANCE


def test_positions_that_go_by_another_padding_token_are_our_own(tmp_path: Path) -> None:
    """RoBERTa counts positions from the number of its padding token: with another one they would be others."""
    ours = drawn(make_model(read_config(their_folder("roberta", tmp_path / "theirs"))[0], VOCAB_SIZE))
    save_model(tmp_path / "ours", ours, extra_config={**TOKEN_IDS, "pad_token_id": 0})
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "llmtrain"
    tokens = numbers(2, LENGTH, 1)
    torch.testing.assert_close(load_language_model(tmp_path / "ours").eval()(tokens), ours(tokens), atol=0, rtol=0)


FIRST = ModelConfig(
    architecture="encoder_decoder", num_layers=2, encoder_layers=1, hidden_size=32, max_sequence_length=64,
    positions="sinusoidal", norm="layernorm", norm_placement="post", activation="relu", bias=True,
)  # fmt: skip
OWN = {
    "the first transformer": FIRST,
    "t5 with rotation": dataclasses.replace(FIRST, positions="rope", norm="rmsnorm", norm_placement="pre", bias=False),
    "an encoder without a head": dataclasses.replace(FIRST, architecture="encoder", encoder_layers=None),
    "switch with a head of its own": dataclasses.replace(
        FIRST,
        positions="relative",
        norm="rmsnorm",
        norm_placement="pre",
        bias=False,
        attention_scale=1.0,
        tied_embeddings=False,
        experts=ExpertsConfig(num_experts=3, experts_per_token=1, normalise_weights=False),
    ),
    "bert with experts": dataclasses.replace(
        FIRST, architecture="encoder", encoder_layers=None, experts=ExpertsConfig(num_experts=3)
    ),
    "bert without segments": dataclasses.replace(
        FIRST, architecture="encoder", encoder_layers=None, positions="learned", embedding_norm="added", mlm_head=True
    ),
}


@pytest.mark.parametrize("config", OWN.values(), ids=OWN.keys())
def test_what_no_family_has_is_saved_as_ours(config: ModelConfig, tmp_path: Path) -> None:
    model = drawn(make_model(config, VOCAB_SIZE))
    save_model(tmp_path, model)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llmtrain"
    assert read_config(tmp_path)[0] == config
    loaded = load_language_model(tmp_path)
    assert type(loaded) is type(model)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


REFUSED = {
    "headless": ("bert", {"architectures": ["BertModel"]}, r"architectures=\['BertModel'\]"),
    "decoder": ("bert", {"is_decoder": True}, "is_decoder=True"),
    "distances": ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    "function of the head": ("modernbert", {"classifier_activation": "silu"}, "hidden_activation.* that differ"),
    "bias of the head": ("modernbert", {"decoder_bias": False}, "decoder_bias=False"),
    "padding": ("roberta", {"pad_token_id": None}, "pad_token_id=None"),
    "function": ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='gated-tanh'"),
    "layers that differ": ("switch", {"num_sparse_decoder_layers": 3}, r"layers \[\[1, 3\], \[0, 1, 2\]\]"),
    "bias of a router": ("switch", {"router_bias": True}, "router_bias=True"),
    "three tables": ("switch", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    "coarse router": ("switch", {"router_dtype": "bfloat16"}, "router_dtype='bfloat16'"),
    "function of experts": ("switch", {"dense_act_fn": "silu"}, "dense_act_fn='silu'"),
}


@pytest.mark.parametrize(("case", "changes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_family_has_beyond_us_is_named(case: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = their_folder(case, tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=words):
        read_config(tmp_path)


@pytest.mark.parametrize("case", ["bert", "t5"])
def test_encoders_are_no_reward_models(case: str, tmp_path: Path) -> None:
    folder = their_folder(case, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "score.weight": torch.zeros(1, 32)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="reward models are decoders"):
        load_scalar_model(folder)


def test_an_encoder_writes_no_answers() -> None:
    model = make_model(tiny_model("bert_tiny"), VOCAB_SIZE)
    with pytest.raises(UserError, match="the model is an encoder"):
        generate(model, [[3, 4]], max_new_tokens=2, stop_tokens=set())


def test_a_source_is_as_long_as_the_encoder_is_built_for() -> None:
    config = dataclasses.replace(tiny_model("t5_tiny"), max_sequence_length=8)
    model = drawn(make_model(config, VOCAB_SIZE))
    [answer] = generate(model, [[3] * 8], max_new_tokens=20, stop_tokens=set(), start_token=1)
    assert len(answer) == 7
    with pytest.raises(UserError, match="prompt 0 has 9 tokens, which is more than the encoder reads"):
        generate(model, [[3] * 9], max_new_tokens=2, stop_tokens=set(), start_token=1)
