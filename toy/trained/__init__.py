"""Models that exist: opened for use, evaluated, exported, described."""

from toy.trained.load import Stored, Trained, load_trained, read_trained
from toy.trained.loaded import Loaded, LoadedClassifier

__all__ = ["Loaded", "LoadedClassifier", "Stored", "Trained", "load_trained", "read_trained"]
