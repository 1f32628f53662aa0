"""Measurements on two GPUs of one host: the block path of every pipe against what the hardware and others do."""
