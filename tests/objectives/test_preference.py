"""Preference objectives: known values, invariance to micro-batches, and the loss and gradient of trl's trainers."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from llmtrain.config.schema import DpoConfig
from llmtrain.objectives.pairs import PairBatch, answer_scores
from llmtrain.objectives.preference import OnTheFly, Preference, dpo_loss
from llmtrain.stages.preference import build_objective


def dpo(reference: nn.Module, **keys: float) -> Preference:
    return build_objective(DpoConfig(**keys), OnTheFly(reference))


@pytest.fixture
def batch(kit) -> PairBatch:
    chosen, chosen_mask = kit.ragged_rows(rows=8, width=12, seed=1)
    rejected, rejected_mask = kit.ragged_rows(rows=8, width=12, seed=2)
    return PairBatch(chosen, rejected, chosen_mask, rejected_mask, torch.zeros(8, dtype=torch.int64))


def mean(metrics, name: str) -> float:
    total, weight = metrics[name]
    return float(total / weight)


def test_score_is_read_at_the_last_answer_token():
    scores = torch.arange(12.0).view(3, 4)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    assert answer_scores(scores, mask).tolist() == [2.0, 7.0, 9.0]


def test_dpo_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 0.5])
    sigmoid = [1 / (1 + math.exp(-0.5 * margin)) for margin in (2.0, -2.5)]
    plain = [-math.log(p) for p in sigmoid]
    smoothed = [-0.9 * math.log(p) - 0.1 * math.log(1 - p) for p in sigmoid]
    assert dpo_loss(chosen, rejected, beta=0.5).tolist() == pytest.approx(plain, rel=1e-6)
    assert dpo_loss(chosen, rejected, beta=0.5, label_smoothing=0.1).tolist() == pytest.approx(smoothed, rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_starts_at_log_two(kit, batch, label_smoothing):
    model = kit.language_model(0)
    loss, metrics = dpo(copy.deepcopy(model), label_smoothing=label_smoothing)(model, batch)
    assert loss.item() / 8 == pytest.approx(math.log(2), rel=1e-6)
    for name in ("accuracy", "margin", "chosen_reward", "rejected_reward", "log_ratio"):
        assert mean(metrics, name) == 0.0


def test_dpo_does_not_train_the_reference(kit, batch):
    model, reference = kit.language_model(0), kit.language_model(1)
    dpo(reference)(model, batch)[0].backward()
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_sft_term_is_the_mean_over_each_chosen_answer(kit, batch):
    model, reference = kit.language_model(0), kit.language_model(1)
    plain, metrics = dpo(reference)(model, batch)
    with_sft, _ = dpo(reference, sft_weight=0.3)(model, batch)
    logits = model.trunk(batch.chosen) @ model.head.T
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, batch.chosen[:, 1:, None])[..., 0]
    mask = batch.chosen_mask[:, 1:]
    per_pair = (nll * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(with_sft - plain, 0.3 * per_pair.sum())
    torch.testing.assert_close(metrics["sft_loss"][0], per_pair.sum().detach())


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(kit, batch, micro_batch_rows):
    cases = [
        (dpo(kit.language_model(1), beta=0.5, label_smoothing=0.1, sft_weight=0.3), kit.language_model(0)),
    ]
    for objective, model in cases:
        whole = kit.gradients(objective, model, batch)
        kit.assert_same_gradients(kit.gradients(objective, model, batch, micro_batch_rows), whole)


# --- trl ---

PAIRS = [
    {"prompt": "a b", "chosen": " c d e f", "rejected": " g"},
    {"prompt": "c", "chosen": " a", "rejected": " b d g e a"},
    {"prompt": "f e d", "chosen": " b b", "rejected": " a g"},
]


def llama(kind: str, seed: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=10,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.5,  # large enough that the models differ
    )
    return getattr(transformers, kind)(config)


class Readable(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, tokens, *, read):
        return read(self.model.model(tokens).last_hidden_state, self.model.lm_head.weight)


def pair_batch(input_ids, mask) -> PairBatch:
    chosen, rejected = input_ids.chunk(2)
    chosen_mask, rejected_mask = mask.bool().chunk(2)
    return PairBatch(chosen, rejected, chosen_mask, rejected_mask, torch.zeros(len(chosen), dtype=torch.int64))


def arguments(folder, rows: int):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "dataset_num_proc": None,
    }


def compare(kit, objective, ours, trainer, inputs, batch) -> None:
    """Loss and gradients of the objective on our reading of a model, and of the trainer on the model itself."""
    trainer.model.train()
    wanted = trainer.compute_loss(trainer.model, inputs)
    wanted.backward()
    loss, _ = objective(ours, batch)
    assert (loss / objective.weight(batch)).item() == pytest.approx(wanted.item(), rel=1e-5)
    found = kit.gradients(objective, ours, batch)
    references = {f"model.{name}": p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    kit.assert_same_gradients(found, references)


@pytest.mark.parametrize(("pairs", "sft_weight"), [(3, 0.0), (1, 0.25)])
def test_dpo_loss_and_gradient_of_trl(kit, trl, tokenizer, tmp_path, pairs, sft_weight):
    """The SFT term is compared on one pair: over several, trl averages over all of their tokens together."""
    datasets = pytest.importorskip("datasets")
    policy, reference = llama("LlamaForCausalLM", 0), llama("LlamaForCausalLM", 1)
    ours, fixed = Readable(policy), Readable(reference)
    config = trl.DPOConfig(
        **arguments(tmp_path, pairs),
        beta=0.3,
        loss_type=["sigmoid", "sft"] if sft_weight else ["sigmoid"],
        loss_weights=[1.0, sft_weight] if sft_weight else None,
    )
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=datasets.Dataset.from_list(PAIRS[:pairs]),
        processing_class=tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    batch = pair_batch(inputs["input_ids"], inputs["completion_mask"])
    assert batch.chosen_mask.any()
    compare(kit, dpo(fixed, beta=0.3, sft_weight=sft_weight), ours, trainer, inputs, batch)


def test_a_pair_of_which_nothing_is_learned_counts_in_the_loss_alone(kit, batch):
    model, reference = kit.language_model(0), kit.language_model(1)
    learned = torch.tensor([True, False, True, False, False, True, True, False])
    flat = dataclasses.replace(
        batch, chosen_mask=batch.chosen_mask & learned[:, None], rejected_mask=batch.rejected_mask & learned[:, None]
    )
    found, alone = dpo(reference)(model, flat)[1], dpo(reference)(model, batch[learned])[1]
    for name, (value, weight) in alone.items():
        if name != "loss":
            torch.testing.assert_close(found[name], (value, weight))
    assert float(found["loss"][1]) == 8
