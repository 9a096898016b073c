"""The C library's settings for training on a CPU; each case in a process of its own, for they hold to its end."""

import os
import subprocess
import sys

import pytest

# Page faults of making and freeing the same 64 MiB again and again.
PROBE = """
import resource, torch
from llmtrain.engine.memory import keep_freed_memory
if {keep}: keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8): torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool, **environment: str) -> int:
    known = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD", "THP_"))
    }
    command = [sys.executable, "-c", PROBE.format(keep=keep)]
    done = subprocess.run(command, env=known | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_used_again() -> None:
    usual = faults(keep=False)
    assert faults(keep=True) < usual / 3


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_the_users_own_settings_stay() -> None:
    own = {"MALLOC_MMAP_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "0"}
    assert faults(keep=True, **own) == pytest.approx(faults(keep=False, **own), rel=0.05)
