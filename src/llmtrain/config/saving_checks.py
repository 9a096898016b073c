"""What is kept of a run, and under which name: what is none, does not fit, or has no effect."""

import re
from collections.abc import Callable, Iterator

from llmtrain.config.folders import CACHE
from llmtrain.config.plain import Finding
from llmtrain.config.view import View, finding, no_effect

NAME = re.compile(r"[A-Za-z0-9._=-]+")
RUN_NAME = "a name of letters, digits and . _ - =, or several joined by /"
LONGEST_NAME = 200


def run_name(view: View) -> Iterator[Finding]:
    """The run names a folder below `runs_dir`."""
    if view.command in ("show", "verify"):  # the name or folder of a run that is there
        return
    run = view["run"]
    parts = run.split("/")
    if not all(NAME.fullmatch(part) and set(part) != {"."} for part in parts):
        yield finding(f"{run!r} is not {RUN_NAME}", "run")
    elif max(map(len, parts)) > LONGEST_NAME:
        yield finding(f"a name of {max(map(len, parts))} letters: file systems take some {LONGEST_NAME}", "run")
    elif parts[0] == CACHE:
        yield finding(f"{run!r} is where the prepared data of all runs is kept; choose another name", "run")


def kept_for_ever(view: View) -> Iterator[Finding]:
    """What is to be kept has to be saved."""
    every, kept = view["checkpoint.every_steps"], view["checkpoint.keep_every_steps"]
    if kept is not None and (every is None or kept % every):
        problem = f"{kept} is no multiple of checkpoint.every_steps={every}: not all of these steps are saved"
        yield finding(problem, "checkpoint.keep_every_steps", "checkpoint.every_steps")
    if every is None and view["checkpoint.every_minutes"] is None:
        why = "only the end of the run is saved; set checkpoint.every_steps or checkpoint.every_minutes"
        yield from no_effect(view, "checkpoint.keep_every_hours", why)


def lost_steps(view: View) -> Iterator[Finding]:
    """No fewer steps may be lost than lie between two saves."""
    every, most = view["checkpoint.every_steps"], view["checkpoint.max_lost_steps"]
    if most is not None and (every is None or most < every):
        problem = f"{most} is less than lies between two saves, with checkpoint.every_steps={every}"
        yield finding(problem, "checkpoint.max_lost_steps", "checkpoint.every_steps")
    elif not view["checkpoint.asynchronous"]:
        why = "with checkpoint.asynchronous=false no kill costs more than what lies between two saves"
        yield from no_effect(view, "checkpoint.max_lost_steps", why)


def mirror(view: View) -> Iterator[Finding]:
    """A mirror is named by a URL."""
    url = view["checkpoint.mirror"]
    if url is not None and not re.fullmatch(r"[a-z0-9+.:-]+://\S+", url):
        yield finding(f"{url!r} is no URL, such as s3://bucket/folder or file:///mnt/folder", "checkpoint.mirror")


SAVING_CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (run_name, kept_for_ever, lost_steps, mirror)
