"""What a model takes, known before anything loads: bytes, FLOPs, what fits where, and how long it takes."""
