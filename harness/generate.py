"""Answers of a model: generated text for language models, label and probability for classifiers."""

from typing import Any

import torch
from torch import nn

from .config import Config
from .evaluate import eval_mode
from .tasks import Task


def generate(model: nn.Module, processor: Any, task: Task, prompts: list[Any], config: Config) -> list[Any]:
    """One answer per prompt. Sampling draws from config.seed, so every rank and every call gives the same answers.

    Leaves torch's random numbers and the model's train / eval mode as they were.
    """
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices), eval_mode(model):
        torch.manual_seed(config.seed)
        return task.predict(model, processor, prompts, config)
