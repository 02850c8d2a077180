"""Start and stop of a run on several hosts: an agent on each host, and the launcher that talks to all of them."""
