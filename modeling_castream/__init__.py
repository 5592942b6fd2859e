"""CA-Stream for Hugging Face Transformers (arXiv:2404.14996).

Importing the package makes `AutoConfig`, `AutoModel` and `AutoModelForImageClassification` know CA-Stream models. A
folder written by `save_pretrained` carries this package's code, and loads without it with `trust_remote_code=True`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_castream import CAStreamConfig
from .image_processing_castream import CAStreamImageProcessor, CAStreamPatchImageProcessor
from .modeling_castream import CAStreamForImageClassification, CAStreamModel
from .pipeline_castream import ImageExplanationPipeline
from .saliency_castream import explain

CAStreamConfig.register_for_auto_class()
CAStreamModel.register_for_auto_class("AutoModel")
CAStreamForImageClassification.register_for_auto_class("AutoModelForImageClassification")
CAStreamImageProcessor.register_for_auto_class()
CAStreamPatchImageProcessor.register_for_auto_class()
AutoConfig.register("castream", CAStreamConfig, exist_ok=True)
AutoModel.register(CAStreamConfig, CAStreamModel, exist_ok=True)
AutoModelForImageClassification.register(CAStreamConfig, CAStreamForImageClassification, exist_ok=True)
if "image-explanation" not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(
        "image-explanation", ImageExplanationPipeline, pt_model=(AutoModelForImageClassification,), type="image"
    )

__all__ = [
    "CAStreamConfig",
    "CAStreamForImageClassification",
    "CAStreamImageProcessor",
    "CAStreamModel",
    "CAStreamPatchImageProcessor",
    "ImageExplanationPipeline",
    "explain",
]
