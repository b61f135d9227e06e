"""Models that exist: opened for use, evaluated, exported, described."""

from toy.trained.load import Stored, Trained, load_trained, read_trained

__all__ = ["Stored", "Trained", "load_trained", "read_trained"]
