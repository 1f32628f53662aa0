"""Lookup buffers: which KV there is, who may take it, and when its memory is free again."""
