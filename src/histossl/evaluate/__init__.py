"""What vectors are worth: labels, splits, the probe and its rivals, search, audit, heatmaps."""
