"""A local page to look at a study: the cohort as a map, every slide in full depth, and what was found on it."""
