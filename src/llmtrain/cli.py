"""The `llmtrain` command: a word, then `key=value` and `group=option`.

Nothing is imported before it is needed: `--help` loads no library, a config fault is told before torch is loaded.
"""

import errno
import importlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from llmtrain import __version__
from llmtrain.config.commands import COMMANDS
from llmtrain.config.errors import ConfigError, UserError

# What the machine refuses; other errors of the operating system are faults of ours.
REFUSED = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EMFILE,
    errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. A user's error is one message on stderr, our own keeps its traceback."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (llmtrain ... | head). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"llmtrain {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        raise ConfigError(_unknown(command))
    flags = _parser(command).parse_intermixed_args(rest)
    _run(command, flags)
    return 0


def _help() -> str:
    """The help of the whole: one line for each command."""
    lines = ["llmtrain: from raw text to an aligned language model", ""]
    lines += ["usage: llmtrain COMMAND [key=value ...] [group=option ...] [flags]", "", "commands"]
    lines += [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "examples"]
    lines += [f"  {command.examples[-1]}" for command in COMMANDS.values()]
    lines += ["", "llmtrain COMMAND --help lists the command's keys, groups and flags; llmtrain --version the version."]
    return "\n".join(lines)


def _unknown(command: str) -> str:
    from llmtrain.config.faults import suggestion

    if command.startswith("-") or "=" in command:
        return f"the command comes first: llmtrain COMMAND {command}; the commands are {', '.join(COMMANDS)}"
    return f"no command {command!r}{suggestion(command, COMMANDS)}\nthe commands are {', '.join(COMMANDS)}"


class Parser(ArgumentParser):
    """Tells of a wrong flag the way all other faults are told."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise ConfigError(f"{message}; see llmtrain {self.prog} --help")


def _parser(command: str) -> Parser:
    """Hydra's flags."""
    parser = Parser(prog=command, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--package", "-p")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--run", "-r", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("--config-dir", "-cd", "--config-path", "-cp", action="append", default=[])
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("--hydra-help", action="store_true")
    return parser


def _run(command: str, flags: Namespace) -> None:
    missing = [folder for folder in flags.config_dir if not Path(folder).is_dir()]
    if missing:
        raise ConfigError(f"--config-dir {missing[0]}: no such folder (from {os.getcwd()})")
    if flags.help:
        print(_command_help(command, flags))
        return
    if command == "show":
        from llmtrain.config.overrides import for_stage

        flags.overrides = for_stage(flags.overrides)
    if _needs_hydra_main(flags):
        from llmtrain.config import hydra_app

        flags.hydra = _hydra_flags(flags)
        hydra_app.run(command, flags, flags.overrides, execute)
    else:
        from llmtrain.config import compose

        config = compose.load_config(
            command, flags.overrides, config_dirs=flags.config_dir, config_name=flags.config_name
        )
        if flags.cfg == "job":
            print(compose.to_yaml(config, flags.package), end="")
        else:
            execute(command, config)


def _command_help(command: str, flags: Namespace) -> str:
    from llmtrain.config import compose
    from llmtrain.config.help import command_help

    try:
        config = compose.load_config(command, flags.overrides, config_dirs=flags.config_dir)
        values = compose.to_dict(config)
    except ConfigError:
        values = {}  # help is wanted all the more: show the schema's defaults
    return command_help(command, values, flags.config_dir)


def _needs_hydra_main(flags: Namespace) -> bool:
    own = flags.multirun or flags.cfg in ("hydra", "all") or flags.info or flags.shell_completion or flags.hydra_help
    return bool(own) or any(text.lstrip("+~").startswith(("hydra.", "hydra/")) for text in flags.overrides)


def _hydra_flags(flags: Namespace) -> list[str]:
    """The flags as `hydra.main` reads them from the command line."""
    named = {"--cfg": flags.cfg, "--package": flags.package, "--info": flags.info}
    words = ("resolve", "run", "multirun", "shell-completion", "hydra-help")
    switches = [f"--{word}" for word in words if getattr(flags, word.replace("-", "_"))]
    return [*switches, *(part for name, value in named.items() if value is not None for part in (name, value))]


def execute(command: str, config: Any) -> Any:
    """Run a command with its config: `run(config)` of the file in `stages/` or `commands/` that has its name."""
    package = "stages" if (Path(__file__).parent / "stages" / f"{command}.py").is_file() else "commands"
    from llmtrain.config.schema import StageConfig

    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        # the user's own `_target_` modules; last, so that no file here takes a library's place
        sys.path.append(os.getcwd())
    if isinstance(config, StageConfig):
        # what the folders of the run and its parents tell is told before torch is loaded
        from llmtrain.stages import handover

        config = handover.resolve_parents(config)
        handover.check_start(config)
    return importlib.import_module(f"llmtrain.{package}.{command}").run(config)
