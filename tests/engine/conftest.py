"""The trainer of a straight line is for all tests of this folder."""

from tests.engine.test_trainer import build

__all__ = ["build"]
