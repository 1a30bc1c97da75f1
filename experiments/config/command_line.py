"""Hydra's own reading of a command line. The only file that imports from `hydra._internal`.

`hydra.main` reads `sys.argv` with a parser that Hydra does not export. Every job of a command line is validated before
the first one loads a model, so the command line has to be read before `hydra.main` reads it, and by the same parser.
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
    """The jobs of a sweep (-m), not one job."""
    help: bool
    """Show this program's help."""
    cfg: bool
    """Show the configuration of the job."""
    info: bool
    """Show how the configuration is composed."""
    hydra_only: bool
    """Show Hydra's help, or complete a word in a shell."""
    other_config: bool
    """Compose from another folder or root card than conf/config.yaml."""

    @property
    def runs(self) -> bool:
        """It runs jobs, and does not only show something."""
        return not (self.help or self.cfg or self.info or self.hydra_only)


def read(arguments: Sequence[str]) -> CommandLine:
    """Reads the arguments that follow the program's name. Exits with status 2 for a flag that Hydra does not know."""
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
