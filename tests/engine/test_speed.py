"""What is said of a run's speed: tokens, MFU, memory, and where the time goes."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from tests.models.small import with_parts
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.engine import speed
from llmtrain.engine.speed import Speed, peak_memory
from llmtrain.models.heads import LanguageModel, make_model
from llmtrain.objectives.masked import MaskedBatch, MaskedTokens
from llmtrain.objectives.sequence_to_sequence import SequencePairBatch, SequenceToSequence

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A second passes whenever somebody looks at the clock."""
    ticks = itertools.count(100.0)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))
    return


@pytest.mark.usefixtures("clock")
def test_time_is_told_by_phase_since_the_last_row() -> None:
    watch = Speed(CPU, flops_per_token=2.0, peak_flops=10.0, flops_per_prediction=30.0)
    assert watch.values() == {}
    for _ in range(2):
        watch.start_step()  # looks at the clock the first time
        with watch.phase("data"):  # twice
            pass
        with watch.phase("forward_backward"):
            pass
        watch.predictions += 5
        watch.end_step(100)
    with watch.phase("evaluation"):
        pass
    with watch.phase("saving"):
        pass
    found = watch.values()
    seconds = {name.removeprefix("perf/seconds/"): value for name, value in found.items() if "/seconds/" in name}
    assert seconds == {
        "data": 2.0, "forward_backward": 2.0, "optimizer": 0.0, "evaluation": 1.0, "saving": 1.0, "total": 13.0,
    }  # fmt: skip
    assert found["perf/tokens_per_second"] == pytest.approx(200 / 11)  # without evaluation and saving
    assert found["perf/mfu"] == pytest.approx((200 * 2 + 10 * 30) / 11 / 10)
    assert found["perf/data_wait"] == pytest.approx(2 / 11)
    assert found["perf/save_stall"] == pytest.approx(1 / 13)
    assert watch.values() == {}
    watch.start_step()
    with watch.phase("rollouts"):
        pass
    watch.end_step(1)
    later = watch.values()
    assert (later["perf/seconds/total"], later["perf/seconds/rollouts"], later["perf/seconds/data"]) == (3.0, 1.0, 0.0)
    assert later.keys() - found.keys() == {"perf/seconds/rollouts"}


@pytest.mark.usefixtures("clock")
def test_phases_on_a_gpu_are_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """Recorded on the device at once: half a second after the one before."""

        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.now += 0.5
            self.at = Event.now

        def elapsed_time(self, end: "Event") -> float:
            return 1000.0 * (end.at - self.at)

    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append("wait"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    watch = Speed(torch.device("cuda"), flops_per_token=1.0, peak_flops=1.0)
    for _ in range(3):
        watch.start_step()
        for phase in ("data", "forward_backward", "forward_backward", "optimizer"):
            with watch.phase(phase):
                pass
        watch.end_step(10)
    assert waits == []  # a step waits for nothing
    with watch.phase("saving"):
        pass
    found = watch.values()
    assert waits == ["wait", "wait"]  # before the save, and to read the row
    assert found["perf/seconds/forward_backward"] == pytest.approx(3.0)
    assert found["perf/seconds/optimizer"] == pytest.approx(1.5)
    assert found["perf/seconds/data"] == pytest.approx(3.0)  # by the program's clock
    assert found["perf/peak_memory_gib"] == 1.5


def test_memory_is_the_most_that_was_held() -> None:
    before = peak_memory(CPU)
    held = torch.ones(int(before * 1.2) // 4)
    assert peak_memory(CPU) >= before * 1.15
    del held
    assert peak_memory(CPU) >= before * 1.15


def counted(model: LanguageModel, objective: MaskedTokens | SequenceToSequence, batch: object) -> float:
    """Three times the matrix products of a forward pass, as torch counts them, without attention's scores."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        objective(model, batch)  # type: ignore[arg-type]
    products = counter.get_flop_counts()["Global"]
    return 3.0 * sum(flops for operator, flops in products.items() if "attention" not in str(operator))


def test_masked_tokens_alone_go_through_the_head() -> None:
    model = make_model(with_parts(architecture="encoder", tied_embeddings=False), 500)
    rows, length, places = 4, 32, 5
    tokens = torch.randint(500, (rows, length))
    where = torch.arange(places).expand(rows, places)
    batch = MaskedBatch(
        tokens, where, tokens[:, :places], torch.ones(rows, places, dtype=torch.bool), torch.zeros(rows)
    )
    assert (batch.num_tokens(), batch.num_predicted()) == (128, 20)
    without_head = model.flops_per_token(0, 0.0)
    head = model.flops_per_token(0, 1.0) - without_head
    said = batch.num_tokens() * without_head + batch.num_predicted() * head
    assert said == pytest.approx(counted(model, MaskedTokens(), batch), rel=1e-6)
    assert model.flops_per_token(0) * batch.num_tokens() > 1.5 * said  # as if all tokens were predicted


def test_targets_alone_go_through_the_head_of_an_encoder_decoder() -> None:
    model = make_model(with_parts(architecture="encoder_decoder", tied_embeddings=False), 500)
    inputs, targets = torch.randint(500, (4, 24)), torch.randint(500, (4, 24))
    batch = SequencePairBatch(inputs, targets, targets, torch.ones(4, 24, dtype=torch.bool), torch.zeros(4))
    without_head = model.flops_per_token(0, 0.0)
    head = model.flops_per_token(0, 1.0) - without_head
    said = batch.num_tokens() * without_head + batch.num_predicted() * head
    assert said == pytest.approx(model.flops_per_token(0) * batch.num_tokens())
    assert said == pytest.approx(counted(model, SequenceToSequence(), batch), rel=1e-6)
