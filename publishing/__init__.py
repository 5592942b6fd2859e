"""Publishing: the model card, the folder that goes to the Hub, the check that it loads there, and the upload.

from castream.publishing import publish, write_model_card
"""

from .card import write_model_card
from .hub import PublishError
from .publication import Published, publish

__all__ = ["PublishError", "Published", "publish", "write_model_card"]
