"""Tile encoders: a slide in, features and augmented views on disk out."""
