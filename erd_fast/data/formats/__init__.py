"""Latents that other projects have stored, read as a stream of batches."""
