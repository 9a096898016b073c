"""`llmtrain doctor`: check on this machine that the numbers come out right."""

import platform
import time
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

from llmtrain import __version__
from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import DoctorConfig
from llmtrain.doctor import checks
from llmtrain.doctor.measurement import Check, Measurement, Skipped
from llmtrain.engine.speed import has_bfloat16, has_compiler


def run(config: DoctorConfig) -> None:
    """Print what there is, then the table of checks. Raises UserError where one fails, ConfigError without a GPU."""
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise ConfigError("device=cuda: torch sees no GPU here; leave device away to check the CPU")
    device = torch.device("cpu" if config.device == "cpu" or not gpu else "cuda")
    console = Console()
    for name, text in description(device):
        console.print(f"{name:<12}{text}", highlight=False, soft_wrap=True)
    began, table, failed, count = time.perf_counter(), new_table(), [], 0
    for check in checks.CHECKS:
        for row, passed in rows(check, device):
            table.add_row(*row)
            count += passed is not None
            failed += [row[0]] * (passed is False)
    # a terminal may fold a long line, but no figure is cut off
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=999)).minimum)
    console.print(table)
    seconds = time.perf_counter() - began
    console.print(f"{count - len(failed)} of {count} pass, in {seconds:.1f} s", highlight=False)
    if failed:
        raise UserError(
            f"{len(failed)} of {count} measurements are off on this machine: {'; '.join(failed)}. What is trained here "
            "cannot be trusted before this is mended: compare the versions above with constraints.txt."
        )


def rows(check: Check, device: torch.device) -> Iterator[tuple[list[str], bool | None]]:
    """The lines of the table that a check makes, each with whether it passed; None for one that was skipped."""
    try:
        for measured in check(device):
            yield cells(measured), measured.passed
    except Skipped as reason:
        yield [f"{check.__name__.replace('_', ' ')}: {reason}", "", "", "", "skipped"], None
    except Exception as error:  # whatever a broken machine makes of it is a result too
        said = str(error).strip().splitlines() or [""]
        yield [f"{check.__name__.replace('_', ' ')}: {type(error).__name__}: {said[0]}", "", "", "", "FAILED"], False


def cells(measured: Measurement) -> list[str]:
    """A measurement as a line of the table."""
    tolerance = f"± {measured.tolerance:g}" if measured.tolerance else "exact"
    verdict = "pass" if measured.passed else "FAILED"
    return [measured.what, f"{measured.expected:.7g}", f"{measured.found:.7g}", tolerance, verdict]


def new_table() -> Table:
    """An empty table of checks."""
    table = Table()
    table.add_column("check")
    for heading in ("expected", "found", "tolerance", "result"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def description(device: torch.device) -> Iterator[tuple[str, str]]:
    """What computes: versions, device, compiler."""
    yield "versions", f"llmtrain {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    capabilities = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    yield "processor", f"{platform.machine()}, {torch.get_num_threads()} threads, {', '.join(capabilities)}"
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        yield "GPU", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    units = "in hardware" if has_bfloat16(device) else "no units for it: emulated, much slower than float32"
    yield "bfloat16", units
    yield "compiler", "found" if has_compiler(device) else "none: torch.compile does not work here"
    yield "checked on", str(device)
