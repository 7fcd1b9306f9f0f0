"""PyTorch's bfloat16 matrix product (oneDNN), for kernels.py.

    python -m peers.torch_matmul --num-threads N

Reads one [rows, outputs, depth, copies, rounds] a line, and answers with the seconds of each round;
the weights are `copies` different matrices, used in turn, so that no cache holds them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-threads", type=int, required=True)
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        print(json.dumps({"missing": f"not installed ({error})"}), flush=True)
        return
    torch.set_num_threads(arguments.num_threads)
    print(json.dumps({"ok": f"PyTorch {torch.__version__}, oneDNN, bfloat16"}), flush=True)
    for line in sys.stdin:
        rows, outputs, depth, copies, rounds = json.loads(line)
        x = torch.ones(rows, depth, dtype=torch.bfloat16)
        weights = torch.ones(copies, outputs, depth, dtype=torch.bfloat16)
        seconds = []
        with torch.inference_mode():
            for number in range(-1, rounds):
                began = time.perf_counter()
                for weight in weights:
                    torch.nn.functional.linear(x, weight)
                if number >= 0:
                    seconds.append((time.perf_counter() - began) / copies)
        print(json.dumps({"ok": seconds}), flush=True)


if __name__ == "__main__":
    main()
