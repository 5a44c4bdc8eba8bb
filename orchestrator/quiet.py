"""Libraries that talk into our progress display are asked to keep to what matters."""

from __future__ import annotations

import logging
import os
import warnings

TALKERS = ("torchao", "torch.utils._pytree", "torch.onnx", "transformers", "accelerate", "httpx")


def quiet() -> None:
    """Silence progress bars and warnings of libraries; errors still show. Call before importing them."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
