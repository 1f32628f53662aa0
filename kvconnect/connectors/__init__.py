"""Connectors: what vLLM sees. The only room in which vllm is imported."""
