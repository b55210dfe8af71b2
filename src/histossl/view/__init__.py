"""A local web page that shows a study: a map of the cohort, each slide at all magnifications, and its overlays."""
