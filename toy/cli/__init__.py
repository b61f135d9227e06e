"""The command line: one module for each family of commands."""

from toy.cli.main import main

__all__ = ["main"]
