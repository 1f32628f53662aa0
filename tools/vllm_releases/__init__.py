"""Which vLLM releases have what kvconnect relies on, read from their source. See ``docs/vllm-versions.md``."""
