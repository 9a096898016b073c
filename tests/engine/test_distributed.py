"""Several processes: they find each other, agree, shard, and the first failure ends all with its own message."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import EngineConfig
from llmtrain.engine import checkpoints, distributed
from llmtrain.engine.distributed import Layout
from llmtrain.engine.launching import launch
from llmtrain.engine.snapshots import Snapshots


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.head = nn.Linear(5, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x) * self.scale


def train(layout: Layout, sharding: str, steps: int, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """The state after some steps on rows that the processes share."""
    model = distributed.spread(Net(), arranged(layout, sharding))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    state = checkpoints.training_state(model, optimizer, {})
    step = 0
    if folder and (found := checkpoints.newest_good(folder, layout, print)):
        checkpoints.load(found, state, layout)
        step = found.step
    for number in range(step, steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        mine = x[layout.rank * 4 // layout.world : (layout.rank + 1) * 4 // layout.world]
        (model(mine).square().sum() * layout.world / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = checkpoints.training_state(model, optimizer, {})
    if folder:
        checkpoints.save(folder, steps, Snapshots(layout, aside=False).take(state), layout, metrics={})
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone() for name, value in state.items()
    }


def arranged(layout: Layout, sharding: str) -> Layout:
    return distributed.arrange(layout, EngineConfig(sharding=sharding))  # type: ignore[arg-type]


def everything(folder: Path) -> None:
    """What each of two processes checks."""
    layout = distributed.join("cpu", threads=1)
    assert (layout.world, layout.is_main) == (2, layout.rank == 0)
    assert distributed.total(torch.tensor(layout.rank + 1.0), layout) == 3
    assert distributed.agree(("from", layout.rank), layout) == ("from", 0)
    assert distributed.gathered(["a"] if layout.rank else [1, None], layout) == [1, None, "a"]

    alone = Layout(rank=0, world=1, device=torch.device("cpu"))
    expected, begun = train(alone, "ddp", 6), train(alone, "ddp", 3)
    assert any(name.startswith("optimizer.blocks.0.weight.exp_avg") for name in expected)
    for sharding in ("ddp", "fsdp"):
        model = distributed.spread(Net(), arranged(layout, sharding))
        assert distributed.is_sharded(model) == (sharding == "fsdp")
        assert distributed.full_state(model)["head.weight"].shape == (3, 5)
        close(train(layout, sharding, 3, folder / sharding), begun)
        close(train(layout, sharding, 6, folder / sharding), expected)  # goes on from step 3
        # what two processes have saved, one reads, and the other layout
        close(train(layout, "fsdp" if sharding == "ddp" else "ddp", 6, folder / sharding), expected)
    (folder / f"done-{layout.rank}").touch()


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_two_processes_agree_and_share_a_model(tmp_path: Path) -> None:
    launch(everything, (tmp_path,), 2)
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
    alone = Layout(rank=0, world=1, device=torch.device("cpu"))
    expected = train(alone, "ddp", 6)
    for sharding in ("ddp", "fsdp"):
        close(train(alone, "ddp", 6, tmp_path / sharding), expected)
        whole = checkpoints.read_model(tmp_path / sharding / "step-00000006")
        close(
            {f"model.{name}": value for name, value in whole.items()},
            {k: v for k, v in expected.items() if k[0] == "m"},
        )


def fail(how: str) -> None:
    layout = distributed.join("cpu", threads=1)
    if layout.rank == 1:
        if how == "told":
            raise ConfigError("rank 1 has no rows: give it some")
        if how == "broken":
            raise ZeroDivisionError("a mistake of ours")
        os.kill(os.getpid(), 9)
    distributed.barrier(layout)  # the other one waits here for ever
    time.sleep(1000)


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("told", ConfigError, r"^rank 1 has no rows: give it some$"),
        ("broken", RuntimeError, "(?s)in process 1:.*ZeroDivisionError: a mistake of ours"),
        ("killed", UserError, "process 1 of 2 was ended from outside .SIGKILL"),
    ],
)
def test_the_first_failure_ends_all_and_is_the_one_told(how: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        launch(fail, (how,), 2)


def go_on(folder: str) -> None:
    """Trains for ever, as a process in the middle of a step does."""
    layout = distributed.join("cpu", threads=1)
    (Path(folder) / f"pid-{layout.rank}").write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)


def test_nobody_trains_on_when_the_launcher_alone_is_interrupted(tmp_path: Path) -> None:
    code = f"""
if __name__ == "__main__":
    from llmtrain.engine.launching import launch
    from tests.engine.test_distributed import go_on
    try:
        launch(go_on, ({str(tmp_path)!r},), 2)
    except KeyboardInterrupt:
        print("interrupted")
"""
    (tmp_path / "main.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(pids := [path.read_text() for path in tmp_path.glob("pid-*")]) < 2 or "" in pids:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match=r"process 2 .*no GPU of its own \(1 in all\)"):
        distributed.join("cuda")
