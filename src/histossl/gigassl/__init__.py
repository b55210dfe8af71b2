"""Slide encoders: slide-level self-supervision after Giga-SSL, from sparse convolution to slide vector."""
