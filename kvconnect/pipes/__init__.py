"""Pipes: how bytes get from one engine to another, one medium a module."""
