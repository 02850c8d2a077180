"""What a run says of itself while it trains: metrics.jsonl and events.jsonl, and DeepSpeed's monitors."""

LOGGED_BY = "engine.mocte.log_to"
"""What run.json says under `logged_by` where a script of a user's own has trained."""
