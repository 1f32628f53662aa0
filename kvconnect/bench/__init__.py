"""``python -m kvconnect bench``: any registered pipe, by the same cases and against the same ceilings."""
