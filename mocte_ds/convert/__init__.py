"""To and from the formats of others: Hugging Face and megatron-core."""
