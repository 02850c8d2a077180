"""What a run says of itself while it trains: metrics.jsonl and events.jsonl, and DeepSpeed's monitors."""
