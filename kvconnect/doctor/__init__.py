"""``python -m kvconnect doctor``: what would work here, how fast, and the cure for what would not."""
