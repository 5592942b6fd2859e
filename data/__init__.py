"""The one way to images: naming, opening, decoding, transforming, sharding and streaming a dataset."""
