"""castream: see what an image classifier looks at. The rooms of this package, and its command line.

>>> from castream import explain_photos
>>> explain_photos("photo.jpg", model="microsoft/resnet-50", output="explained")
"""

__all__ = ["explain_photos"]


def __getattr__(name: str):
    """`explain_photos`, imported when it is asked for: every room imports this package, and few need torch for it."""
    if name == "explain_photos":
        from .explain import explain_photos

        return explain_photos
    raise AttributeError(f"module 'castream' has no attribute {name!r}")
