"""A routing key of your own, that of kind_of_byte.py, in deepspeed_loop.py's loop.

DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 examples/routing_key.py --out runs/key
"""

import kind_of_byte  # noqa: F401  registers the key that the config names
from deepspeed_loop import CONFIG, main

if __name__ == "__main__":
    main({**CONFIG, "mocte": {**CONFIG["mocte"], "router": {"kind": "kind-of-byte"}}})
