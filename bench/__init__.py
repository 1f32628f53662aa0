"""Measurements: every registered pipe against memcpy, a bare socket, NIXL/UCX and gloo."""
