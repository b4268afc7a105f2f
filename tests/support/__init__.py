"""Helpers that tests share. pytest puts tests/ on the import path: ``from support.parity import hold``."""
