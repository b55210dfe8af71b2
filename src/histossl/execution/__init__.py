"""Runs stages over many slides: worker processes, clusters, claims, the journal."""
