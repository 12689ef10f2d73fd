"""The `oncofed` command: one module a group of subcommands."""

from oncofed.deploy.cli.main import cli, main

__all__ = ["cli", "main"]
