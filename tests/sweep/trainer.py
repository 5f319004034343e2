"""Stands in for `m6rec train` where a test is about the sweep: no jax, a validation every 20 ms, SIGTERM saves.

optim.warmup says what happens: 100 + n ends well with figures around n / 100 (a loss of one less that); 1 fails as the verb does; 2 dies of a
signal; 3 is stopped once from outside, with exit code 75; 4 measures nothing; 5 ends well, but slowly; up to 105 it waits after
two validations to be told to stop.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

words = sys.argv[1:]
run = Path(words[words.index("--run") + 1])
kind = next(int(word.partition("=")[2]) for word in words if word.startswith("--optim.warmup="))
run.mkdir(parents=True, exist_ok=True)
with open(run / "calls", "a") as file:
    print(os.environ.get("CUDA_VISIBLE_DEVICES", ""), file=file)


def leave(*_):
    with open(run / "terminated", "a") as file:
        print(os.getpid(), file=file)
    sys.exit(75)


signal.signal(signal.SIGTERM, leave)
metrics = run / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
if kind == 1:
    print("a warning\nm6rec: out of device memory; lower data.rows\nsome thread at the exit", file=sys.stderr)
    sys.exit(2)
if kind == 2:
    print("step 3", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if kind == 4:
    sys.exit(0)
for step in range(done + 1, 6):
    time.sleep(0.4 if kind == 5 else 0.02)
    with open(metrics, "a") as file:
        value = max(kind - 100, 1) / 100 * (0.5 + 0.1 * min(step, 4))
        file.write(json.dumps({"step": 10 * step, "valid/ndcg@10": value, "valid/loss/a": 1 - value}) + "\n")
    if 100 < kind <= 105 and step == 2:
        time.sleep(30)
    if kind == 3 and not done and step == 2:
        sys.exit(75)
