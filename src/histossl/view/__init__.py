"""What people look at: a local web viewer of a study; `report` is one self-contained HTML page."""
