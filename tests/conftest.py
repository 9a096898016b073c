"""For all tests: Hypothesis draws the same examples every time, so that what passed once passes again.

HYPOTHESIS_PROFILE=default draws others each time, to look for more.
"""

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
