"""What `erd-fast bench` and the files of bench/ both run: cases, timing, baselines, JSON."""
