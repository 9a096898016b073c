"""The reward model's objective: known values, a loop in double precision, the loss and gradient of trl's trainer."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from llmtrain.objectives.rankings import RankingBatch, ranking_scores
from llmtrain.objectives.reward import BradleyTerry, calibration_error, correlation

ALL_TRL = [(0.0, 0.0), (1.0, 0.0), (0.0, 0.01), (1.0, 0.01)]


def rankings(kit, counts: list[int], ties: bool = False) -> RankingBatch:
    """Rankings of `counts` answers; the lower its number the better, or with ties the first two are alike."""
    size, rows = max(counts), len(counts)
    sides = [kit.ragged_rows(rows=rows, width=12, seed=seed) for seed in range(1, size + 1)]
    tokens, mask = (torch.stack(each, dim=1) for each in zip(*sides, strict=True))
    there = torch.arange(size) < torch.tensor(counts)[:, None]
    better = torch.ones(size, size, dtype=torch.bool).triu(1) & there[:, :, None] & there[:, None, :]
    if ties:
        better[:, 0, 1] = False
    margins = torch.rand(rows, size, size, generator=torch.Generator().manual_seed(9)) * better
    return RankingBatch(tokens, mask & there[:, :, None], better, margins, torch.zeros(rows, dtype=torch.int64))


def mean(metrics, name: str) -> float:
    total, weight = metrics[name]
    return float(total / weight)


class Ramp(nn.Module):
    """Each token is its own score."""

    def forward(self, tokens):
        return tokens.float()


def test_equal_scores_are_log_two(kit):
    model, batch = kit.score_model(0), rankings(kit, [2, 4, 3])
    model.score.data.zero_()
    loss, metrics = BradleyTerry()(model, batch)
    assert loss.item() / 3 == pytest.approx(math.log(2), rel=1e-6)
    assert mean(metrics, "accuracy") == 0.0  # ties are wrong
    assert mean(metrics, "margin") == 0.0


def test_known_scores_of_pairs():
    tokens = torch.tensor([[[1, 3, 0], [1, 2, 0]], [[1, 2, 0], [1, 3, 0]]])
    mask = torch.tensor([False, True, False]).expand(2, 2, 3)
    better = torch.tensor([[False, True], [False, False]]).expand(2, 2, 2)
    batch = RankingBatch(tokens, mask, better, torch.zeros(2, 2, 2), torch.zeros(2, dtype=torch.int64))
    loss, metrics = BradleyTerry()(Ramp(), batch)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(1)))
    assert mean(metrics, "accuracy") == 0.5
    assert mean(metrics, "chosen_score") == 2.5
    assert batch.num_tokens() == 12


@pytest.mark.parametrize(("margin_weight", "centring_weight"), [*ALL_TRL, (0.3, 0.2)])
@pytest.mark.parametrize("ties", [False, True])
def test_rankings_are_a_loop_over_their_pairs(kit, margin_weight, centring_weight, ties):
    """Each answer read alone, without padding, in double precision; the largest difference is below 1e-6."""
    model, batch = kit.score_model(0), rankings(kit, [3, 4, 5], ties)
    exact = copy.deepcopy(model).double()
    wanted = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch)):
        losses = []
        for best, worse in itertools.permutations(range(5), 2):
            if batch.better[row, best, worse]:
                one, other = (
                    exact(batch.tokens[row, each][: int(batch.mask[row, each].nonzero().max()) + 1][None])[0, -1]
                    for each in (best, worse)
                )
                lead = one - other - margin_weight * batch.margins[row, best, worse].double()
                losses.append(torch.log1p(torch.exp(-lead)) + centring_weight * (one + other) ** 2)
        assert len(losses) == (3, 6, 10)[row] - ties
        wanted = wanted + sum(losses) / len(losses)
    (wanted / len(batch)).backward()

    objective = BradleyTerry(margin_weight, centring_weight)
    loss, metrics = objective(model, batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert mean(metrics, "loss") == pytest.approx(loss.item() / 3, rel=1e-6)
    found = {name: value.double() for name, value in kit.gradients(objective, model, batch).items()}
    kit.assert_same_gradients(found, {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}, 1e-6)


def test_every_answer_is_read_once(kit):
    read = []

    class Counting(nn.Module):
        def forward(self, tokens):
            read.append(len(tokens))
            return tokens.float()

    batch = rankings(kit, [2, 5, 3])
    scores = ranking_scores(Counting(), batch)
    assert read == [10]
    last = batch.mask.long().cumsum(dim=2).argmax(dim=2, keepdim=True)
    expected = batch.tokens.gather(2, last)[..., 0] * batch.mask.any(dim=2)
    assert torch.equal(scores, expected.float())
    assert batch.num_tokens() == 10 * 12


def test_a_pair_is_a_ranking_of_two_in_the_order_chosen_rejected(kit):
    batch = rankings(kit, [2, 2, 2])
    tokens, mask = batch.rows()
    assert torch.equal(tokens, torch.cat([batch.tokens[:, 0], batch.tokens[:, 1]]))
    assert torch.equal(mask, torch.cat([batch.mask[:, 0], batch.mask[:, 1]]))


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 3])
def test_micro_batches_do_not_change_the_gradient(kit, micro_batch_rows):
    objective, model, batch = BradleyTerry(0.5, 0.1), kit.score_model(0), rankings(kit, [2, 4, 3, 2, 5, 2])
    whole = kit.gradients(objective, model, batch)
    kit.assert_same_gradients(kit.gradients(objective, model, batch, micro_batch_rows), whole)


def test_calibration_error_by_hand():
    def lead(certainty: float) -> float:
        return math.log(certainty / (1 - certainty))

    # in the bin from 0.7 to 0.75 one of two is right, in that from 0.9 to 0.95 one of one; a tie is half right
    leads = torch.tensor([lead(0.72), -lead(0.74), lead(0.92), 0.0], dtype=torch.float64)
    assert calibration_error(leads) == pytest.approx((abs(0.5 - 0.73) * 2 + abs(1 - 0.92) + 0) / 4, abs=1e-12)
    assert calibration_error(torch.tensor([40.0, 50.0])) == pytest.approx(0.0, abs=1e-12)
    assert calibration_error(torch.tensor([-40.0, 40.0])) == pytest.approx(0.5, abs=1e-12)


def test_pairs_that_are_right_as_often_as_said_are_calibrated():
    draw = torch.Generator().manual_seed(0)
    leads = 2 * torch.randn(20_000, generator=draw)
    right = torch.rand(20_000, generator=draw) < torch.sigmoid(leads)
    signed = torch.where(right, leads, -leads)
    assert calibration_error(signed) < 0.02
    assert calibration_error(5 * signed) > 0.1


def test_correlation_is_pearsons():
    one, other = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3, 3, 9])
    assert correlation(one, other) == pytest.approx(float(torch.corrcoef(torch.stack([one, other.float()]))[0, 1]))
    assert correlation(one, torch.ones(3)) is None


# --- trl ---

PAIRS = [
    {"prompt": "a b", "chosen": " c d e f", "rejected": " g", "margin": 0.5},
    {"prompt": "c", "chosen": " a", "rejected": " b d g e a", "margin": 2.0},
    {"prompt": "f e d", "chosen": " b b", "rejected": " a g", "margin": 0.0},
]


class Scoring(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, tokens):
        return self.model.score(self.model.model(tokens).last_hidden_state)[..., 0]


@pytest.mark.parametrize(("margin_weight", "centring_weight"), ALL_TRL)
def test_loss_and_gradient_of_trl(kit, tmp_path, margin_weight, centring_weight):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefg"])}
    rules = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    rules.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(shape)
    ours = Scoring(model)
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=3, report_to="none", use_cpu=True, bf16=False,
            dataset_num_proc=None, center_rewards_coefficient=centring_weight or None,
        ),
        train_dataset=datasets.Dataset.from_list(
            PAIRS if margin_weight else [{key: row[key] for key in row if key != "margin"} for row in PAIRS]
        ),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=rules, pad_token="<pad>", eos_token="<eos>"
        ),
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    assert ("margin" in inputs) == bool(margin_weight)
    tokens, mask = (torch.stack(inputs[name].chunk(2), dim=1) for name in ("input_ids", "attention_mask"))
    better = torch.tensor([[False, True], [False, False]]).expand(3, 2, 2)
    margins = better * inputs.get("margin", torch.zeros(3))[:, None, None]
    batch = RankingBatch(tokens, mask.bool(), better, margins, torch.zeros(3, dtype=torch.int64))

    trainer.model.train()
    wanted = trainer.compute_loss(trainer.model, dict(inputs))
    wanted.backward()
    objective = BradleyTerry(margin_weight, centring_weight)
    loss, _ = objective(ours, batch)
    assert (loss / objective.weight(batch)).item() == pytest.approx(wanted.item(), rel=1e-5)
    references = {f"model.{name}": p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    kit.assert_same_gradients(kit.gradients(objective, ours, batch), references)
