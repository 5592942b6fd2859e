"""The embedded dataset: rendered scenes whose objects have a known mask."""
