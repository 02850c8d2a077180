"""A rank that trains nothing: says who it is, and ends as it is told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

mode, folder = sys.argv[1], Path(sys.argv[2])
rank, stop = int(os.environ["RANK"]), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(mode != "deaf"))
if mode in ("long", "deaf"):
    subprocess.Popen(["sleep", "300"])  # what a rank has started must end with it
variables = (
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NCCL_TEST",
    "SECRET",
)
(folder / f"started_{rank}").write_text("\n".join(str(os.environ.get(name)) for name in variables), encoding="utf-8")
if mode == "half" and rank == 1:
    while not (folder / "started_0").is_file():
        time.sleep(0.02)
    sys.exit(3)
until = time.monotonic() + (1.0 if mode in ("well", "fails", "user") else 120.0)
while time.monotonic() < until and not (stop and stop[0]):
    time.sleep(0.02)
if stop:
    print("saving", flush=True)  # breaks where nobody forwards it
    (folder / f"saved_{rank}").touch()
elif mode in ("fails", "user") and rank == 1:
    sys.exit(3 if mode == "fails" else 2)
elif mode in ("fails", "user"):
    time.sleep(60)  # waits for the rank that is gone
