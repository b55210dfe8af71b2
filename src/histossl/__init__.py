"""Learning from histopathology slides without labels."""

__version__ = "0.1.0"
