"""Modules that models are made of, and how their parameters begin."""
