"""Publishing: the model card, the folder that goes to the Hub, the check that it loads there, and the upload."""

from .card import write_model_card

__all__ = ["write_model_card"]
