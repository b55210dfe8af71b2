"""Runs functions over many slides, in processes and on clusters: workers, claims, the journal, the shared table."""
