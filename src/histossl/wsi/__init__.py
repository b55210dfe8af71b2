"""Whole-slide images: readers, mpp, tissue, tiles and geometry; `synth` paints slides with known truth."""
