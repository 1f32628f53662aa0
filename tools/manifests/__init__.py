"""Manifests as the Helm chart renders them, without a cluster."""
