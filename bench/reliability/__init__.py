"""What faults cost whoever sends requests to two real engines. ``python -m bench.reliability``."""
