"""What a run will need: bytes, FLOPs and time, computed before anything is started."""
