"""The C library's memory, told how training uses it.

A step frees and asks for the same large tensors as the step before. glibc gives large blocks back to the kernel at
once, and the kernel hands them out again page by page, zeroed: a tenth of a step on two CPU cores.
"""

import ctypes
import os

# mallopt's parameters, from <malloc.h>.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep what it frees, and have torch ask for its large tensors in huge pages.

    Call it before the first tensor of the run. Does nothing where the C library is not glibc. What the user has set
    in the environment (MALLOC_*, THP_MEM_ALLOC_ENABLE, another allocator preloaded) stays as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name.startswith("MALLOC_") for name in os.environ) or "LD_PRELOAD" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)  # large blocks come from the heap, which is kept
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
