"""Parameters of the architectures in configs/model against the published figures and the reference implementations."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tests.models.small import published
from tests.tiny import TINY_MODELS

from llmtrain.config.folders import packaged_configs
from llmtrain.models.footprint import num_active, num_parameters, num_without_embeddings
from llmtrain.models.formats import save_config
from llmtrain.models.heads import make_model
from llmtrain.models.meta import on_meta

# All parameters of a released checkpoint, by its name on the Hugging Face hub: exact.
RELEASED = {
    "gpt1": ("openai-community/openai-gpt", 116_534_784),
    "gpt2_small": ("openai-community/gpt2", 124_439_808),
    "gpt2_medium": ("openai-community/gpt2-medium", 354_823_168),
    "gpt2_large": ("openai-community/gpt2-large", 774_030_080),
    "gpt2_xl": ("openai-community/gpt2-xl", 1_557_611_200),
    "pythia_70m": ("EleutherAI/pythia-70m", 70_426_624),
    "pythia_160m": ("EleutherAI/pythia-160m", 162_322_944),
    "pythia_410m": ("EleutherAI/pythia-410m", 405_334_016),
    "pythia_1b": ("EleutherAI/pythia-1b", 1_011_781_632),
    "pythia_1_4b": ("EleutherAI/pythia-1.4b", 1_414_647_808),
    "pythia_2_8b": ("EleutherAI/pythia-2.8b", 2_775_208_960),
    "pythia_6_9b": ("EleutherAI/pythia-6.9b", 6_857_302_016),
    "pythia_12b": ("EleutherAI/pythia-12b", 11_846_072_320),
    "llama_7b": ("huggyllama/llama-7b", 6_738_415_616),
    "llama_13b": ("huggyllama/llama-13b", 13_015_864_320),
    "llama_33b": ("huggyllama/llama-30b", 32_528_943_616),
    "llama_65b": ("huggyllama/llama-65b", 65_285_660_672),
    "llama2_7b": ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
    "llama2_13b": ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
    "llama2_70b": ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
    "llama3_8b": ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
    "llama3_70b": ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
    "llama3_405b": ("meta-llama/Llama-3.1-405B", 405_853_388_800),
    "llama_1b": ("meta-llama/Llama-3.2-1B", 1_235_814_400),
    "llama3_2_1b": ("meta-llama/Llama-3.2-1B", 1_235_814_400),
    "llama3_2_3b": ("meta-llama/Llama-3.2-3B", 3_212_749_824),
    "mistral_7b": ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
    "qwen2_7b": ("Qwen/Qwen2-7B", 7_615_616_512),
    "qwen3_0_6b": ("Qwen/Qwen3-0.6B", 596_049_920),
    "qwen3_1_7b": ("Qwen/Qwen3-1.7B", 1_720_574_976),
    "qwen3_4b": ("Qwen/Qwen3-4B", 4_022_468_096),
    "qwen3_8b": ("Qwen/Qwen3-8B", 8_190_735_360),
    "olmo2_1b": ("allenai/OLMo-2-0425-1B", 1_484_916_736),
    "olmo2_7b": ("allenai/OLMo-2-1124-7B", 7_298_617_344),
    "olmo2_13b": ("allenai/OLMo-2-1124-13B", 13_716_198_400),
    "gemma2_2b": ("google/gemma-2-2b", 2_614_341_888),
    "gemma2_9b": ("google/gemma-2-9b", 9_241_705_984),
    "gemma2_27b": ("google/gemma-2-27b", 27_227_128_320),
    "gemma3_1b": ("google/gemma-3-1b-pt", 999_885_952),
    "phi3_mini": ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
    "falcon_7b": ("tiiuae/falcon-7b", 6_921_720_704),
    "mpt_7b": ("mosaicml/mpt-7b", 6_649_286_656),
    "starcoder_15b": ("bigcode/starcoderbase", 15_517_456_384),
    "mixtral_8x7b": ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    "qwen3_30b_a3b": ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
    "olmoe_1b_7b": ("allenai/OLMoE-1B-7B-0924", 6_919_161_856),
    "bert_base": ("google-bert/bert-base-uncased", 110_106_428),  # with both heads
    "bert_large": ("google-bert/bert-large-uncased", 336_226_108),
    "roberta_base": ("FacebookAI/roberta-base", 124_697_433),  # with the head of masked tokens, as the next
    "modernbert_base": ("answerdotai/ModernBERT-base", 149_655_232),
    "t5_v1_1_small": ("google/t5-v1_1-small", 76_961_152),
    "t5_v1_1_base": ("google/t5-v1_1-base", 247_577_856),
    "t5_v1_1_large": ("google/t5-v1_1-large", 783_150_080),
    "t5_v1_1_xl": ("google/t5-v1_1-xl", 2_849_757_184),
    "t5_v1_1_xxl": ("google/t5-v1_1-xxl", 11_135_332_352),
    "switch_base": ("google/switch-base-8", 619_339_008),
}
# google/switch-base-16 and so on, by their number of experts.
SWITCH_BASE = {
    16: 1_072_397_568, 32: 1_978_514_688, 64: 3_790_748_928, 128: 7_415_217_408, 256: 14_664_154_368
}  # fmt: skip
# Parameters without embeddings and head as they are printed; digits in full are exact, others rounded.
PYTHIA = "Biderman et al. 2023 (arXiv 2304.01373), table 1"
GEMMA_2 = "Gemma team 2024 (arXiv 2408.00118), table 2"
GEMMA_3 = "Gemma team 2025 (arXiv 2503.19786), table 1"
QWEN_3 = "the model's card"
WITHOUT_EMBEDDINGS = {
    "pythia_70m": (PYTHIA, "18,915,328"),
    "pythia_160m": (PYTHIA, "85,056,000"),
    "pythia_410m": (PYTHIA, "302,311,424"),
    "pythia_1b": (PYTHIA, "805,736,448"),
    "pythia_1_4b": (PYTHIA, "1,208,602,624"),
    "pythia_2_8b": (PYTHIA, "2,517,652,480"),
    "pythia_6_9b": (PYTHIA, "6,444,163,072"),
    "pythia_12b": (PYTHIA, "11,327,027,200"),
    "gemma2_2b": (GEMMA_2, "2,024,517,888"),
    "gemma2_9b": (GEMMA_2, "8,324,201,984"),
    "gemma2_27b": (GEMMA_2, "26,047,480,320"),
    "gemma3_1b": (GEMMA_3, "698M"),
    "gemma3_4b": (GEMMA_3, "3209M"),
    "gemma3_12b": (GEMMA_3, "10759M"),
    "gemma3_27b": (GEMMA_3, "25600M"),
    "qwen3_0_6b": (QWEN_3, "0.44B"),
    "qwen3_1_7b": (QWEN_3, "1.4B"),
    "qwen3_4b": (QWEN_3, "3.6B"),
    "qwen3_8b": (QWEN_3, "6.95B"),
}
# GPT-3's table 2.1 (arXiv 2005.14165) and LLaMA's table 2 (arXiv 2302.13971), in two or three digits.
GPT_3 = {
    "gpt3_small": 125e6,
    "gpt3_medium": 350e6,
    "gpt3_large": 760e6,
    "gpt3_xl": 1.3e9,
    "gpt3_2_7b": 2.7e9,
    "gpt3_6_7b": 6.7e9,
    "gpt3_13b": 13.0e9,
    "gpt3_175b": 175.0e9,
}
LLAMA_1 = {"llama_7b": 6.7e9, "llama_13b": 13.0e9, "llama_33b": 32.5e9, "llama_65b": 65.2e9}
# Parameters that a token goes through as the model's cards print them, with the embedding.
ACTIVE = {"mixtral_8x7b": 12.9e9, "qwen3_30b_a3b": 3.3e9, "olmoe_1b_7b": 1.3e9}
OURS = ("bench_a", "bench_b", "llama_10m", "llama_100m", *TINY_MODELS)


def test_every_published_architecture_is_in_a_table() -> None:
    names = {file.stem for file in (packaged_configs() / "model").glob("*.yaml")}
    assert names - {*OURS} == {*RELEASED, *WITHOUT_EMBEDDINGS, *GPT_3, "transformer_base"}


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_are_those_of_the_released_model(name: str) -> None:
    assert num_parameters(published(name)) == RELEASED[name][1]


@pytest.mark.parametrize("name", WITHOUT_EMBEDDINGS)
def test_parameters_without_embeddings_are_as_printed(name: str) -> None:
    _, figure = WITHOUT_EMBEDDINGS[name]
    number, unit = float(figure.rstrip("MB").replace(",", "")), {"M": 1e6, "B": 1e9}.get(figure[-1], 1.0)
    digits = len(figure.rstrip("MB").partition(".")[2])
    assert round(num_without_embeddings(published(name)) / unit, digits) == number


@pytest.mark.parametrize("name", GPT_3)
def test_gpt_3_has_the_parameters_of_the_paper_as_far_as_it_prints_them(name: str) -> None:
    """Within 2 %: 1.7 and 1.8 % are the rounding of 350M and 2.7B, 1.1 % the paper's width of 5140 for 13B."""
    assert num_parameters(published(name)) == pytest.approx(GPT_3[name], rel=0.02)


@pytest.mark.parametrize("name", LLAMA_1)
def test_llama_has_the_parameters_of_the_paper_in_its_three_digits(name: str) -> None:
    """Cut, not rounded: the largest has 65.29B."""
    assert math.floor(num_parameters(published(name)) / 1e8) * 1e8 == LLAMA_1[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_goes_through_as_many_as_printed(name: str) -> None:
    """To the digit that is printed, rounded or cut: Qwen3's is 3.35B."""
    model = published(name)
    active = num_active(model) + model.trunk.token_embedding.weight.numel()
    assert active == pytest.approx(ACTIVE[name], abs=0.06e9)


def test_gpt_3_differs_from_what_the_lora_paper_counts_by_less_than_its_embedding() -> None:
    """175,255.8M in table 4 of arXiv 2106.09685, which does not say how it counts.

    96 layers of 12288 with biases, 50257 tokens and 2048 positions are 174,604.3M with the token embedding as head,
    175,221.8M with a head of its own: that is 34.0M, or 0.02 %, less than the paper's.
    """
    model = published("gpt3_175b")
    assert num_parameters(model) == 174_604_259_328
    with_head = num_parameters(model) + 50_257 * 12_288
    assert 175_255.8e6 - with_head == pytest.approx(34.0e6, abs=0.1e6)


@pytest.mark.parametrize("name", sorted({*RELEASED, *WITHOUT_EMBEDDINGS, *GPT_3} - {"gpt1"}))
def test_transformers_has_as_many(name: str, tmp_path: Path) -> None:
    """Its own model of our config.json, on the meta device."""
    transformers = pytest.importorskip("transformers")
    model = published(name)
    save_config(tmp_path, model)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = getattr(transformers, config.architectures[0])(config)
    # its T5 shares the head with the embedding until it reads one of its own
    shared = 0 if theirs.config.tie_word_embeddings == model.config.tied_embeddings else model.head_weight.numel()
    assert sum(each.numel() for each in theirs.parameters()) + shared == num_parameters(model)


@pytest.mark.parametrize("experts", SWITCH_BASE)
def test_switch_base_with_more_experts(experts: int) -> None:
    """The same with another number: here, by Transformers' class of the released configs, and as listed above."""
    transformers = pytest.importorskip("transformers")
    config = published("switch_base").config
    assert config.experts is not None
    with on_meta():
        ours = make_model(
            dataclasses.replace(config, experts=dataclasses.replace(config.experts, num_experts=experts)), 32_128
        )
    released = {"d_ff": 3072, "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6, "num_experts": experts}
    with torch.device("meta"):
        theirs = transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(**released)
        )
    assert num_parameters(ours) == sum(each.numel() for each in theirs.parameters()) == SWITCH_BASE[experts]


def test_transformers_has_as_many_in_gpt_1() -> None:
    """Whose layout is not among ours; its defaults are the released model's."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig())
    assert sum(each.numel() for each in theirs.parameters()) == num_parameters(published("gpt1"))


@pytest.mark.parametrize(("name", "trunk_and_pooler"), [("bert_base", 109_482_240), ("bert_large", 335_141_888)])
def test_bert_without_its_heads(name: str, trunk_and_pooler: int) -> None:
    """As Transformers' BertModel counts."""
    model = published(name)
    assert num_parameters(model.trunk) + num_parameters(model.pooler) == trunk_and_pooler


def test_the_first_transformer_has_what_its_paper_prints() -> None:
    """65 million (arXiv 1706.03762, table 3): within 3 %, for the vocabulary is said in thousands."""
    assert num_parameters(published("transformer_base")) == 63_082_496
    assert num_parameters(published("transformer_base")) == pytest.approx(65e6, rel=0.03)
