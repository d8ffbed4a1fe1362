"""The T2T-ViT models: built by name, loaded from checkpoints."""

from t2tvit.models.backbone import T2TBackbone, T2TVisionTransformer
from t2tvit.models.checkpoint import LoadReport, load_checkpoint
from t2tvit.models.embed import T2TEmbed
from t2tvit.models.registry import BASELINES, MODELS, ModelConfig, create_model, list_models
from t2tvit.models.t2t_module import T2TModule, TokenConvolution, TokenPerformer, TokenTransformer
from t2tvit.models.variants import T2TDenseVisionTransformer

__all__ = [
    "BASELINES",
    "MODELS",
    "LoadReport",
    "ModelConfig",
    "T2TBackbone",
    "T2TDenseVisionTransformer",
    "T2TEmbed",
    "T2TModule",
    "T2TVisionTransformer",
    "TokenConvolution",
    "TokenPerformer",
    "TokenTransformer",
    "create_model",
    "list_models",
    "load_checkpoint",
]
