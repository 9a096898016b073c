"""`llmtrain doctor`: check on this machine that the numbers come out right."""

import platform
import time
from collections.abc import Iterator

import torch

from llmtrain import __version__
from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import DoctorConfig
from llmtrain.doctor import checks
from llmtrain.doctor.measurement import Check, Skipped
from llmtrain.doctor.training import compiling
from llmtrain.engine.speed import has_bfloat16, has_compiler


def run(config: DoctorConfig) -> None:
    """Print what there is, then the table of checks. Raises UserError where one fails, ConfigError without a GPU."""
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise ConfigError("device=cuda: torch sees no GPU here; leave device away to check the CPU")
    device = torch.device("cpu" if config.device == "cpu" or not gpu else "cuda")
    for name, text in description(device):
        print(f"{name:<12}{text}")
    print("\n" + line("check", "expected", "found", "tolerance", "result"), flush=True)
    began, failed, count = time.perf_counter(), [], 0
    for check in checks.CHECKS:
        if check is compiling and not config.compile:
            continue
        for text, passed in lines(check, device):
            print(text, flush=True)
            count += passed is not None
            failed += [check.__name__.replace("_", " ")] * (passed is False)
    print(f"\n{count - len(failed)} of {count} pass, in {time.perf_counter() - began:.1f} s")
    if failed:
        raise UserError(
            f"{len(failed)} of {count} measurements are off on this machine ({', '.join(dict.fromkeys(failed))}). "
            "What is trained here cannot be trusted before that is mended: are the versions those of constraints.txt?"
        )


def lines(check: Check, device: torch.device) -> Iterator[tuple[str, bool | None]]:
    """The lines of the table that a check makes, each with whether it passed; None for one that was skipped."""
    name = check.__name__.replace("_", " ")
    try:
        for each in check(device):
            tolerance = f"± {each.tolerance:g}" if each.tolerance else "exact"
            found, verdict = f"{each.found:.7g}", "pass" if each.passed else "FAILED"
            yield line(each.what, f"{each.expected:.7g}", found, tolerance, verdict), each.passed
    except Skipped as reason:
        yield f"{name}: skipped: {reason}", None
    except Exception as error:  # whatever a broken machine makes of it is a result too
        said = str(error).strip().splitlines() or [""]
        yield f"{name}: FAILED: {type(error).__name__}: {said[0]}", False


def line(what: str, expected: str, found: str, tolerance: str, result: str) -> str:
    """One line of the table."""
    return f"{what:<64}{expected:>12}{found:>15}{tolerance:>11}  {result}"


def description(device: torch.device) -> Iterator[tuple[str, str]]:
    """What computes: versions, device, compiler."""
    yield "versions", f"llmtrain {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    instructions = torch.backends.cpu.get_cpu_capability()
    yield "processor", f"{platform.machine()}, {instructions} instructions, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        yield "GPU", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    units = "in hardware" if has_bfloat16(device) else "no units for it: emulated, much slower than float32"
    yield "bfloat16", units
    yield "compiler", "found" if has_compiler(device) else "none: torch.compile does not work here"
    yield "checked on", str(device)
