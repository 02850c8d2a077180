"""The pre-training loop of launch/pretrain.py and what it writes."""
