"""For all tests: what the environment says does not change them.

Hypothesis draws the same examples every time, so that what passed once passes again; HYPOTHESIS_PROFILE=default draws
others each time, to look for more. LLMTRAIN_DATA is for the tests of real data, which read it when they are collected.
"""

import os
import signal

import pytest
from hypothesis import settings

# What a shell starts in the background ignores interrupts, and so would every command that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def _no_real_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMTRAIN_DATA", raising=False)
