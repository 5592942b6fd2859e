"""castream: see what an image classifier looks at. The rooms of this package, and its command line."""
