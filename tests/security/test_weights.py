"""Model folders, checkpoints and adapters from anybody: nothing of them runs, and each is refused in a few lines."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.security.hostile import Canary, JsonObject, change, refused, safetensors

from llmtrain.config.errors import UserError
from llmtrain.config.schema import ModelConfig
from llmtrain.data.ledger import Ledger
from llmtrain.data.streaming import read_positions
from llmtrain.engine import checkpoints
from llmtrain.engine.distributed import Layout
from llmtrain.engine.snapshots import Snapshots
from llmtrain.models.formats import load_language_model, save_model
from llmtrain.models.heads import make_model
from llmtrain.models.peft_folders import add_adapter

SMALL = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, max_sequence_length=32)
TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that can be loaded, until it is changed."""
    save_model(tmp_path / "model", make_model(SMALL, 40), extra_config={"eos_token_id": 0})
    return tmp_path / "model"


PICKLES = ("pytorch_model.bin", "model.pt", "model.pth")


@pytest.mark.parametrize("name", [*PICKLES, "model.safetensors", "part.safetensors"])
def test_pickled_weights_are_not_opened(name: str, folder: Path, tmp_path: Path) -> None:
    canary = Canary(tmp_path / "canary")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(canary.pickled)
    if name == "part.safetensors":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with refused("pickled weights only" if name in PICKLES else "cannot be read as safetensors"):
        load_language_model(folder)
    assert not canary.path.exists()


def test_pickles_beside_weights_are_passed_over(folder: Path, tmp_path: Path) -> None:
    canary = Canary(tmp_path / "canary")
    names = (*PICKLES, "optimizer.pt", "training_args.bin", "tokenizer.pkl", "modeling_evil.py", "model.npy")
    for name in names:
        (folder / name).write_bytes(canary.pickled)
    change(folder / "config.json", auto_map={"AutoModel": "modeling_evil.Model"}, _target_="os.system")
    load_language_model(folder)
    assert not canary.path.exists()


HEADERS: dict[str, tuple[Any, ...]] = {
    "length of 2^60": (b"{}", b"", 2**60),
    "length of 2^64 - 1": (b"{}", b"", 2**64 - 1),
    "no header": (b"", b""),
    "offsets out of range": ({"a": TENSOR | {"shape": [2**48], "data_offsets": [0, 2**50]}}, b"\0" * 64),
    "offsets that overlap": ({"a": TENSOR, "b": TENSOR}, b"\0" * 8),
    "offsets backwards": ({"a": TENSOR | {"data_offsets": [8, 0]}}, b"\0" * 8),
    "negative shape": ({"a": TENSOR | {"shape": [-2]}}, b"\0" * 8),
    "shape beyond counting": ({"a": TENSOR | {"shape": [2**62, 2**62]}}, b"\0" * 8),
    "enormous and empty": ({"a": TENSOR | {"shape": [0, 2**62], "data_offsets": [0, 0]}}, b""),
    "unknown dtype": ({"a": TENSOR | {"dtype": "PICKLE"}}, b"\0" * 8),
    "dtype that torch has not": ({"a": TENSOR | {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"\0" * 3),
    "a name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(TENSOR).encode(),) * 2), b"\0" * 8),
    "nested deeply": (b'{"a":' + DEEP.encode() + b"}", b""),
    "metadata that is no text": ({"__metadata__": {"a": 1}, "a": TENSOR}, b"\0" * 8),
}


@pytest.mark.parametrize("name", HEADERS)
def test_absurd_headers(name: str, folder: Path) -> None:
    safetensors(folder / "model.safetensors", *HEADERS[name])
    with refused(str(folder)):
        load_language_model(folder)


INDEXES: dict[str, tuple[Any, str]] = {
    "upwards": ({"a": "../../../../etc/passwd"}, "'../../../../etc/passwd'; only .safetensors files beside it"),
    "upwards to weights": ({"a": "../model/part.safetensors"}, "only .safetensors files beside it are read"),
    "absolute": ({"a": "/etc/passwd"}, "'/etc/passwd'; only .safetensors files beside it"),
    "a device": ({"a": "/dev/zero"}, "only .safetensors files beside it are read"),
    "a pickle": ({"a": "part.bin"}, "only .safetensors files beside it are read"),
    "not there": ({"a": "other.safetensors"}, "names files that are not there: other.safetensors"),
    "a number": ({"a": 5}, "does not say which file"),
    "a list": ([1], "does not say which file"),
    "null": (None, "does not say which file"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_points_elsewhere(name: str, folder: Path) -> None:
    content, words = INDEXES[name]
    os.rename(folder / "model.safetensors", folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": content}))
    with refused("model.safetensors.index.json", words):
        load_language_model(folder)


def test_links_to_other_files_are_read_as_weights_and_nothing_else(folder: Path) -> None:
    """The hub's cache consists of links, so they are followed."""
    os.rename(folder / "model.safetensors", folder.parent / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    load_language_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/passwd")
    with refused("cannot be read as safetensors") as _:
        load_language_model(folder)


SIZES: dict[str, tuple[JsonObject, str]] = {
    "layers": ({"num_hidden_layers": 10**9}, "num_layers: Input should be less than or equal to"),
    "more layers than tensors": ({"num_hidden_layers": 16_000}, "it speaks of 16,000 layers, and there are 20 tensors"),
    "width": ({"hidden_size": 2**40, "head_dim": 8}, "hidden_size: Input should be less"),
    "inner width": ({"intermediate_size": 2**60}, "ffn_hidden_size: Input should be less"),
    "heads": ({"num_attention_heads": 2**40, "head_dim": 2**40}, "num_heads: Input should be less"),
    "vocabulary": ({"vocab_size": 2**62}, "vocab_size=4611686018427387904"),
    "positions": ({"max_position_embeddings": 2**62}, "max_sequence_length: Input should be less"),
    "all that is allowed": (
        {"hidden_size": 2**20, "intermediate_size": 2**24, "num_attention_heads": 2**16, "head_dim": 2**20,
         "num_key_value_heads": 2**16, "vocab_size": 2**31, "num_hidden_layers": 2}, "of another shape",
    ),
    "a float": ({"num_hidden_layers": 1e300}, "valid integer"),
    "a text": ({"hidden_size": "16"}, "valid integer"),
    "a list": ({"vocab_size": [40]}, "vocab_size=[40]"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_absurd_sizes_are_refused_before_anything_is_made(name: str, folder: Path) -> None:
    keys, words = SIZES[name]
    change(folder / "config.json", **keys)
    before = time.process_time()
    with refused("config.json", words):
        load_language_model(folder)
    assert time.process_time() - before < 5


@pytest.mark.parametrize("text", ['{"model_type": "llama", "a": ' + DEEP + "}", "[]", "\ud800", "", "{" * 10**6])
def test_a_config_that_is_no_object(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with refused("config.json: "):
        load_language_model(folder)


def test_an_endless_config_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(10**12)  # of zeros that take no room on the disk
    with refused("config.json: longer than 67,108,864 bytes"):
        load_language_model(folder)


# Checkpoints ------------------------------------------------------------------------------------------------------

ALONE = Layout(rank=0, world=1, device=torch.device("cpu"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    state = {"model.weight": torch.ones(4, 2), "optimizer.weight.exp_avg": torch.zeros(4, 2)}
    return checkpoints.save(tmp_path, 1, Snapshots(ALONE, aside=False).take(state), ALONE, metrics={}).folder


def resign(folder: Path, **more: str) -> None:
    """A manifest that fits the files."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    change(folder / "manifest.json", sha256=digests | more)


def own_shard(folder: Path) -> Path:
    [shard] = (folder / "state").glob("*.safetensors")
    return shard


def with_offsets(folder: Path, said: Any) -> None:
    """The shard says where its tensors belong."""
    save_file({"model.weight": torch.ones(4, 2)}, own_shard(folder), metadata={"DCP_SHARDING_INFO": json.dumps(said)})


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a name outside": (lambda it: resign(it, **{"../../../etc/passwd": "0"}), "manifest names '../../../etc/passwd'"),
    "an absolute name": (lambda it: resign(it, **{"/etc/passwd": "0"}), "manifest names '/etc/passwd'"),
    "a link outside": (lambda it: (it / "state" / "x").symlink_to("/etc/passwd") or resign(it), "which is outside"),
    "a shard too many": (
        lambda it: shutil.copy(own_shard(it), it / "state" / "more.safetensors"), "more.safetensors is not in its manif"
    ),
    "an absurd header": (
        lambda it: (safetensors(own_shard(it), b"{}", b"", 2**60), resign(it)), "its shards cannot be read"
    ),
    "a pickle for a shard": (
        lambda it: (own_shard(it).write_bytes(Canary(it.parent / "canary").pickled), resign(it)), "cannot be read"
    ),
    "a deep manifest": (lambda it: (it / "manifest.json").write_text(DEEP), "its manifest cannot be read"),
    "metrics that are none": (lambda it: change(it / "manifest.json", metrics={"a": "b"}), "manifest cannot be read"),
    "no digests": (lambda it: change(it / "manifest.json", sha256=5), "its manifest cannot be read"),
    "an absurd step": (lambda it: change(it / "manifest.json", step=10**400), "its manifest says step 1000"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoints_are_passed_over(name: str, checkpoint: Path, tmp_path: Path) -> None:
    spoil, words = CHECKPOINTS[name]
    canary = Canary(tmp_path / "canary")
    for pickled in (".metadata", "__0_0.distcp", "optimizer.pt", "rng.pt"):
        (checkpoint / "state" / pickled).write_bytes(canary.pickled)
    resign(checkpoint)
    assert checkpoints.inspect(checkpoint) is None
    spoil(checkpoint)
    assert words in str(checkpoints.inspect(checkpoint))
    said: list[str] = []
    assert checkpoints.newest_good(tmp_path, ALONE, said.append) is None
    assert len(said) == 1
    assert not canary.path.exists()


OFFSETS: dict[str, Any] = {
    "far out": {"model.weight": {"saved_offsets": [2**50, 0]}},
    "negative": {"model.weight": {"saved_offsets": [-1, 0]}},
    "of another tensor": {"model.other": {"saved_offsets": [0, 0]}},
    "of other dimensions": {"model.weight": {"saved_offsets": [0]}},
    "texts": {"model.weight": {"saved_offsets": ["a", "b"]}},
    "a list": [1],
}


@pytest.mark.parametrize("name", OFFSETS)
def test_shards_that_do_not_fit_together(name: str, checkpoint: Path) -> None:
    with_offsets(checkpoint, OFFSETS[name])
    resign(checkpoint)
    with refused(f"checkpoint {checkpoint}: its shards do not fit together"):
        checkpoints.read_model(checkpoint)
    with refused("its shards do not fit together"):
        state = {"model.weight": torch.ones(8, 2)}
        checkpoints.load(checkpoints.read(checkpoint), state, ALONE)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"phases": 5}', '{"phases": [[0, {}]], "__class__": 1}', DEEP])
def test_what_was_drawn_is_not_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "mixture.json").write_text(text)
    with refused("mixture.json"):
        Ledger.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 5}', '{"a": {"portion": 1, "evil": 2}}', DEEP])
def test_where_streams_stood_is_not_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "streams.json").write_text(text)
    with refused("streams.json"):
        read_positions(tmp_path)


# Adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_whose_product_would_be_enormous(tmp_path: Path) -> None:
    model, name = make_model(SMALL, 40), "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 2**20), f"{name}.lora_B.weight": torch.ones(2**20, 1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    with refused("does not fit the model"):
        add_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="no folder of LoRA weights"):
        add_adapter(model, tmp_path)
