"""Files: checkpoints, run directories and their events. Every reader raises `BadFileError` for a file it cannot trust."""

from toy.files.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from toy.files.errors import BadFileError
from toy.files.events import read_events
from toy.files.runs import Run, RunWarning

__all__ = ["BadFileError", "Checkpoint", "Run", "RunWarning", "read_checkpoint", "read_events", "write_checkpoint"]
