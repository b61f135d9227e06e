"""Engines: a model realized on an op table."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from toy.config import ModelConfig
from toy.engines.handle import EngineHandle, build, check_options
from toy.engines.named import GPT2SeqEngine, LlamaSeqEngine, LlamaSeqEngineMetal, ViTTinyEngine
from toy.models import ParameterTree, model_for
from toy.models.base import Model
from toy.switch import eager_ops

__all__ = [
    "EngineHandle", "GPT2SeqEngine", "LlamaSeqEngine", "LlamaSeqEngineMetal", "ViTTinyEngine", "build", "check_options",
    "model_from",
]  # fmt: skip

Model.default_ops = staticmethod(eager_ops)  # models are handed their op table; this is the one when nobody says


def model_from(config: ModelConfig, parameters: Mapping[str, npt.ArrayLike], backend: str = "auto") -> Model:
    """A readable model (TransformerLM, GPT2) on an eager op table, with the given weights: for generation and inspection.

    parameters: dict of names to arrays. Raises ValueError when they are not this config's.
    """
    model_class = model_for(config)
    tree = ParameterTree.zeros(model_class.parameter_shapes(config), np.float32)
    tree.load(parameters)
    return model_class.from_config(config, ops=eager_ops(backend), parameters=tree)
