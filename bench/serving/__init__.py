"""Hand-overs between real vLLM engines on two GPUs, against other connectors and the floor."""
