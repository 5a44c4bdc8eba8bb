"""Libraries that talk into our progress display are asked to keep to what matters."""

from __future__ import annotations

import logging
import os
import warnings

TALKERS = (
    "torchao",
    "torch.utils._pytree",
    "torch.onnx",
    "transformers",
    "accelerate",
    "httpx",
)


def quiet() -> None:
    """Silence progress bars and warnings of libraries; errors still show. Call before importing them."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import datasets
    import torch
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on stdout that it is
