"""Tokens-to-Token Vision Transformers on fused kernels: the models and their trainer."""

import importlib.util
import warnings

from t2tvit import hub
from t2tvit.loading import Loaded, load
from t2tvit.models import T2TEmbed, create_model, list_models, load_checkpoint
from t2tvit.version import __version__

__all__ = [
    "Loaded",
    "T2TEmbed",
    "__version__",
    "create_model",
    "hub",
    "list_models",
    "load",
    "load_checkpoint",
]

if importlib.util.find_spec("timm") is not None:
    try:
        import t2tvit.models.timm_entrypoints  # noqa: F401  its import registers the names
    # Any error can occur: a torchvision built for another torch raises a RuntimeError, for instance.
    except Exception as error:
        warnings.warn(
            f"timm is installed but cannot be imported, so the t2t_vit models are not registered there: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
