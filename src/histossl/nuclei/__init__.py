"""Nuclei without labels: stains, pseudo-labels, networks, tiled inference, export and scores."""
