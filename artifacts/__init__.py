"""Folders on disk: whole or absent, told apart by fingerprints."""
