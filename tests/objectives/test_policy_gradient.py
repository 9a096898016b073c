"""GRPO, RLOO and REINFORCE: ratio 1 at first, averages over what they say, the losses and gradients of trl."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from llmtrain.objectives.policy_gradient import Grpo, Reinforce, clipped_policy_loss, policy_logprobs
from llmtrain.objectives.trajectories import JudgedAnswers

PROMPT, TEMPERATURE = 2, 0.7


def judged(kit, sampler: nn.Module, reference: nn.Module | None = None) -> JudgedAnswers:
    """Eight answers as a rollout leaves them, with made-up advantages; one answer counts for nothing."""
    tokens, mask = kit.ragged_rows(rows=8, width=12, seed=3, prompt=PROMPT)
    mask[5] = False
    with torch.no_grad():
        logprobs = policy_logprobs(sampler, tokens, mask, TEMPERATURE)[0]
        of_reference = None if reference is None else policy_logprobs(reference, tokens, mask, TEMPERATURE)[0]
    advantages = torch.randn(8, generator=torch.Generator().manual_seed(5))
    return JudgedAnswers(
        tokens=tokens, response_mask=mask, logprobs=logprobs, advantages=advantages, reference_logprobs=of_reference,
        group_rows=4, first_slot=0, seed=11, step=4,
    )  # fmt: skip


def mean(metrics, name: str) -> float:
    return float(metrics[name][0] / metrics[name][1])


@pytest.mark.parametrize("objective", [Grpo(temperature=TEMPERATURE), Reinforce(temperature=TEMPERATURE)])
def test_first_update_has_ratio_one(kit, objective):
    model = kit.language_model(0)
    _, metrics = objective(model, judged(kit, model))
    assert mean(metrics, "ratio") == 1.0
    assert metrics["ratio_max"][0] == metrics["ratio_min"][0] == 1.0
    assert mean(metrics, "approx_kl") == mean(metrics, "clip_fraction") == 0.0
    assert mean(metrics, "entropy") > 0


@pytest.mark.parametrize("micro_batch_rows", [4, None])
@pytest.mark.parametrize("objective", [Grpo(temperature=TEMPERATURE), Reinforce(temperature=TEMPERATURE)])
def test_a_single_update_needs_no_log_probabilities_of_the_sampler(kit, objective, micro_batch_rows):
    model = kit.language_model(0)
    known = judged(kit, model, kit.language_model(2))
    unknown = dataclasses.replace(known, logprobs=None)
    wanted, found = (objective(model, batch) for batch in (known, unknown))
    assert found[0] == wanted[0]
    of_answers = found[1].pop("align/kl", None)  # the rollout tells it where it knows the log-probabilities
    assert found[1] == wanted[1]
    if isinstance(objective, Grpo):
        mask = known.response_mask[:, 1:]
        kl = ((known.logprobs - known.reference_logprobs) * mask).sum(dim=1)
        assert float(of_answers[0] / of_answers[1]) == pytest.approx(float(kl.mean()), rel=1e-6)
    gradients = [kit.gradients(objective, model, batch, micro_batch_rows) for batch in (known, unknown)]
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_answers_can_be_left_out_of_the_loss_but_not_of_the_kl(kit, average):
    model, objective = kit.language_model(0), Grpo(loss_average=average, temperature=TEMPERATURE)
    whole = dataclasses.replace(judged(kit, model, kit.language_model(2)), logprobs=None)
    learned = torch.arange(8) % 3 > 0
    some = dataclasses.replace(whole, learned=learned)
    gone = dataclasses.replace(whole, response_mask=whole.response_mask & learned[:, None])
    assert objective.weight(some) == objective.weight(gone)
    kit.assert_same_gradients(kit.gradients(objective, model, some), kit.gradients(objective, model, gone))
    assert objective(model, some)[1]["align/kl"] == objective(model, whole)[1]["align/kl"]


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_losses_are_averaged_over_what_is_said(kit, average):
    model = kit.language_model(0)
    batch = judged(kit, model)
    objective = Grpo(loss_average=average, max_new_tokens=20, temperature=TEMPERATURE)
    loss, metrics = objective(model, batch)
    lengths = batch.response_mask.sum(dim=1).tolist()
    losses = [[-float(a)] * length for a, length in zip(batch.advantages, lengths, strict=True)]  # the ratio is 1
    wanted = {
        "sequence": sum(sum(each) / max(len(each), 1) for each in losses) / 8,
        "token": sum(map(sum, losses)) / sum(lengths),
        "constant": sum(map(sum, losses)) / (8 * 20),
    }[average]
    assert float(loss.detach() / objective.weight(batch)) == pytest.approx(wanted, rel=1e-5)
    assert mean(metrics, "loss") == pytest.approx(wanted, rel=1e-5)


def test_reinforce_has_the_gradient_of_the_log_probability(kit):
    """Williams 1992: the mean of -A times the gradient of log π(answer), in double precision."""
    model = kit.language_model(0)
    batch = judged(kit, model)
    found = kit.gradients(Reinforce(temperature=TEMPERATURE), model, batch)
    exact = kit.language_model(0).double()
    table = (exact.trunk(batch.tokens) @ exact.head.T / TEMPERATURE).log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for row, t in batch.response_mask[:, 1:].nonzero().tolist():
        total = total - batch.advantages[row] * table[row, t, batch.tokens[row, t + 1]]
    (total / 8).backward()
    kit.assert_same_gradients(
        found, {name: p.grad.float() for name, p in exact.named_parameters() if p.grad is not None}
    )


def test_clip_above_one_has_a_range_of_its_own():
    ratio = torch.tensor([0.5, 0.79, 1.25, 1.5]).log()
    everything, positive = torch.ones(4, dtype=torch.bool), torch.ones(4)
    losses = [
        clipped_policy_loss(ratio, torch.zeros(4), advantages, everything, clip_range=0.2, clip_range_high=0.3)
        for advantages in (positive, -positive)
    ]  # fmt: skip
    torch.testing.assert_close(losses[0], -torch.tensor([0.5, 0.79, 1.25, 1.3]))
    torch.testing.assert_close(losses[1], torch.tensor([0.8, 0.8, 1.25, 1.5]))


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
@pytest.mark.parametrize("objective", [*(Grpo(loss_average=n) for n in ("sequence", "token", "constant")), Reinforce()])
def test_micro_batches_do_not_change_the_gradient(kit, objective, micro_batch_rows):
    batch, model = judged(kit, kit.language_model(0), kit.language_model(2)), kit.language_model(1)
    whole = kit.gradients(objective, model, batch)
    kit.assert_same_gradients(kit.gradients(objective, model, batch, micro_batch_rows), whole)


def test_the_limit_hears_of_the_kl(kit):
    heard = []

    class Stop:
        def add(self, kl, count):
            heard.append(float(kl / count))

    batch = dataclasses.replace(judged(kit, kit.language_model(0)), kl_stop=Stop())
    for objective in (Grpo(), Reinforce()):
        _, metrics = objective(kit.language_model(1), batch)
        assert heard.pop() == pytest.approx(mean(metrics, "approx_kl"))


def by_other_kernels(batch: JudgedAnswers, **changes) -> JudgedAnswers:
    """The answers as if kernels had sampled them that find each token up to e times as likely, or as unlikely."""
    off = torch.rand(batch.logprobs.shape, generator=torch.Generator().manual_seed(6)) * 2 - 1
    mask = batch.response_mask[:, 1:]
    told = torch.where(mask, batch.logprobs + off, 0.0)
    return dataclasses.replace(batch, sampler_logprobs=told, **changes)


@pytest.mark.parametrize("objective", [Grpo(temperature=TEMPERATURE), Reinforce(temperature=TEMPERATURE)])
def test_losses_of_what_other_kernels_have_sampled_are_weighed(kit, objective):
    """At ratio 1 the gradient is that of −Σ w A log π, here in float64."""
    model = kit.language_model(0)
    batch = by_other_kernels(judged(kit, model), importance_limit=1.5)
    mask = batch.response_mask[:, 1:]
    change = torch.where(mask, batch.logprobs - batch.sampler_logprobs, 0.0).double()
    exact = kit.language_model(0).double()
    table = (exact.trunk(batch.tokens) @ exact.head.T / TEMPERATURE).log_softmax(-1)[:, :-1]
    logprobs = torch.where(mask, table.gather(-1, batch.tokens[:, 1:, None])[..., 0], 0.0)
    if isinstance(objective, Grpo):
        weights, share = change.exp().clamp(max=1.5), 1 / mask.sum(dim=1, keepdim=True).clamp(min=1)
    else:
        weights, share = change.sum(dim=1, keepdim=True).exp().clamp(max=1.5), 1.0
    assert 0 < (weights == 1.5).double().mean() < 1
    (-(weights * share * batch.advantages[:, None] * logprobs).sum() / 8).backward()
    wanted = {name: p.grad.float() for name, p in exact.named_parameters() if p.grad is not None}
    for each in (batch, dataclasses.replace(batch, logprobs=None)):
        kit.assert_same_gradients(kit.gradients(objective, model, each), wanted)
        metrics = objective(model, each)[1]
        assert mean(metrics, "ratio") == 1.0
        assert mean(metrics, "sampler_mismatch") == pytest.approx(float(change.abs().sum() / mask.sum()), rel=1e-6)


@pytest.mark.parametrize("objective", [Grpo(temperature=TEMPERATURE), Reinforce(temperature=TEMPERATURE)])
def test_other_kernels_may_count_as_the_policys_own(kit, objective):
    model = kit.language_model(1)
    batch = judged(kit, kit.language_model(0))
    of_others = by_other_kernels(batch)
    loss, metrics = objective(model, of_others)
    assert loss == objective(model, batch)[0]
    assert mean(metrics, "sampler_mismatch") > 0.1
    # what an engine cannot tell is taken as the policy's own
    of_others.sampler_logprobs.fill_(float("nan"))
    weighed = dataclasses.replace(of_others, importance_limit=2.0)
    loss, metrics = objective(model, weighed)
    assert loss == objective(model, batch)[0]
    assert mean(metrics, "sampler_mismatch") == 0.0


# --- trl ---


class Readable(nn.Module):
    """A Llama of Transformers, read as ours are."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, *, read, same_as=None):
        return read(self.model.model(tokens).last_hidden_state, self.model.lm_head.weight)


@pytest.fixture(scope="module")
def llamas():
    """Policy, the policy that sampled, reference: near each other, so that ratios are clipped here and there."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    policy = transformers.LlamaForCausalLM(config)
    others = [copy.deepcopy(policy) for _ in range(2)]
    for other in others:
        for parameter in other.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return policy, *others


@pytest.fixture(scope="module")
def trainers(llamas, tmp_path_factory):
    """trl's trainers on that policy; the tests set what is compared."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    options = {
        "output_dir": str(tmp_path_factory.mktemp("trl")), "per_device_train_batch_size": 4, "num_generations": 4,
        "report_to": "none", "use_cpu": True, "bf16": False, "temperature": TEMPERATURE, "max_completion_length": 20,
        "beta": 0.0,
    }  # fmt: skip
    made = {}
    for name in ("GRPO", "RLOO"):
        made[name] = getattr(trl, f"{name}Trainer")(
            model=copy.deepcopy(llamas[0]), args=getattr(trl, f"{name}Config")(**options),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=datasets.Dataset.from_list([{"prompt": "a"}]), processing_class=tokenizer,
        )  # fmt: skip
        made[name].current_gradient_accumulation_steps = 1
    return made


def compare(kit, trainer, objective, model, batch: JudgedAnswers, **known) -> None:
    """Loss and gradients of the objective on our reading of the policy, and of trl's trainer on the policy itself."""
    mask = batch.response_mask[:, PROMPT:]
    inputs = {
        "prompt_ids": batch.tokens[:, :PROMPT], "prompt_mask": torch.ones(8, PROMPT, dtype=torch.int64),
        "completion_ids": batch.tokens[:, PROMPT:], "completion_mask": mask.long(), "advantages": batch.advantages,
        "num_items_in_batch": mask.sum(), **known,
    }  # fmt: skip
    trainer.model.train()
    trainer.model.zero_grad()
    wanted = trainer._compute_loss(trainer.model, inputs)
    wanted.backward()
    ours = Readable(model)
    loss, metrics = objective(ours, batch)
    assert (loss / objective.weight(batch)).item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    assert 0 < mean(metrics, "clip_fraction") < 1
    references = {f"model.{name}": p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    kit.assert_same_gradients(kit.gradients(objective, ours, batch), references)


@pytest.mark.parametrize(("kl_coefficient", "unbiased_kl"), [(0.0, True), (0.3, False), (0.3, True)])
@pytest.mark.parametrize("high", [None, 0.28])
@pytest.mark.parametrize(
    ("average", "loss_type"), [("sequence", "grpo"), ("token", "dapo"), ("token", "bnpo"), ("constant", "dr_grpo")]
)
def test_grpo_loss_and_gradient_of_trl(kit, trainers, llamas, average, loss_type, high, kl_coefficient, unbiased_kl):
    policy, sampler, reference = llamas
    trainer = trainers["GRPO"]
    trainer.loss_type, trainer.beta, trainer.epsilon_low = loss_type, kl_coefficient, 0.1
    trainer.epsilon_high, trainer.args.use_bias_correction_kl = high or 0.1, unbiased_kl
    batch = judged(kit, Readable(sampler), Readable(reference) if kl_coefficient else None)
    objective = Grpo(
        0.1, high, kl_coefficient, average, max_new_tokens=20, temperature=TEMPERATURE, unbiased_kl=unbiased_kl
    )
    known = {"old_per_token_logps": batch.logprobs[:, PROMPT - 1 :]}
    if kl_coefficient:
        known["ref_per_token_logps"] = batch.reference_logprobs[:, PROMPT - 1 :]
    compare(kit, trainer, objective, policy, batch, **known)


def test_truncated_importance_of_trl(kit, trainers, llamas, monkeypatch):
    policy, sampler, reference = llamas
    trainer = trainers["GRPO"]
    trainer.loss_type, trainer.beta, trainer.epsilon_low, trainer.epsilon_high = "grpo", 0.3, 0.1, 0.1
    trainer.args.use_bias_correction_kl = True
    monkeypatch.setattr(trainer, "use_vllm", True)
    monkeypatch.setattr(trainer, "vllm_importance_sampling_correction", True)
    batch = by_other_kernels(judged(kit, Readable(sampler), Readable(reference)), importance_limit=1.5)
    told = (batch.logprobs - batch.sampler_logprobs)[:, PROMPT - 1 :] * batch.response_mask[:, PROMPT:]
    known = {
        "old_per_token_logps": batch.logprobs[:, PROMPT - 1 :], "importance_sampling_ratio": told.exp().clamp(max=1.5),
        "ref_per_token_logps": batch.reference_logprobs[:, PROMPT - 1 :],
    }  # fmt: skip
    compare(kit, trainer, Grpo(0.1, None, 0.3, temperature=TEMPERATURE), policy, batch, **known)


def test_rloo_loss_and_gradient_of_trl(kit, trainers, llamas):
    policy, sampler, _ = llamas
    trainer = trainers["RLOO"]
    trainer.epsilon_low = trainer.epsilon_high = 0.1
    batch = judged(kit, Readable(sampler))
    compare(kit, trainer, Reinforce(0.1, TEMPERATURE), policy, batch, old_logps=batch.logprobs.sum(dim=1))
