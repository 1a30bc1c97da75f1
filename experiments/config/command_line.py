"""Parses a command line with Hydra's own parser. The only file that imports from `hydra._internal`.

`hydra.main` reads `sys.argv` with a parser that Hydra does not export. Every job of a command line is validated before
the first one loads a model, so the command line is parsed before `hydra.main` runs, by the same parser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.utils import get_args_parser


@dataclass(frozen=True)
class CommandLine:
    """A command line as Hydra reads it."""

    overrides: list[str]
    multirun: bool
    """-m: run all jobs of a sweep, not one job."""
    help: bool
    """--help: show this program's help."""
    cfg: bool
    """--cfg: show the configuration of the job."""
    info: bool
    """--info: show how the configuration is composed."""
    hydra_only: bool
    """Show Hydra's help, or complete a word for the shell."""
    other_config: bool
    """The root card is not conf/config.yaml: --config-dir, --config-path or --config-name."""

    @property
    def runs(self) -> bool:
        """Whether the command runs jobs, and does not only print something."""
        return not (self.help or self.cfg or self.info or self.hydra_only)


def read(arguments: Sequence[str]) -> CommandLine:
    """Parses the arguments that follow the program's name. Exits with status 2 for a flag that Hydra does not know."""
    args = get_args_parser().parse_args(list(arguments))
    return CommandLine(
        overrides=args.overrides,
        multirun=bool(args.multirun),
        help=bool(args.help),
        cfg=bool(args.cfg),
        info=bool(args.info),
        hydra_only=bool(args.hydra_help or args.shell_completion),
        other_config=bool(args.config_dir or args.config_path or args.config_name),
    )
