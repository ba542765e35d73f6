"""Tokens per second of a step: the engine against the loop that most people would write, in alternating rounds.

Each round runs every side once, in processes of its own, and the ratio is taken within the round; reported are medians
over the rounds. Needs torch and nothing else; `--device cuda` on a machine with a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    options = ["--steps", str(arguments.steps), "--device", arguments.device]
    python = [sys.executable]
    torchrun = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    members = [*python, "bench/members.py", *options]
    sides = {
        "torchrun DDP, 2 processes": [*torchrun, "bench/rivals/loop.py", *options],
        "elastic, exact, 2 members": [*members, "--reduction", "exact"],
        "elastic, fast, 2 members": [*members, "--reduction", "fast"],
        "plain loop, 1 process": [*python, "bench/rivals/loop.py", *options],
        "elastic, exact, 1 member": [*members, "--reduction", "exact", "--world-size", "1"],
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    parts: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    digests = set()
    for number in range(arguments.rounds):
        for side, command in sides.items():
            told = common.run_side(command)
            rates[side].append(common.TOKENS_PER_STEP / statistics.median(told["step_s"]))
            for name, values in told.get("parts", {}).items():
                parts[side].setdefault(name, []).append(statistics.median(values))
            if "exact" in side:
                digests.add(told["digest"])
            print(f"round {number + 1}: {side}: {rates[side][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
    print(f"{common.machine()}; {common.TOKENS_PER_STEP} tokens per step, {arguments.rounds} rounds\n")
    rows = []
    for side in sides:
        rival = "plain loop, 1 process" if "1 " in side else "torchrun DDP, 2 processes"
        ratios = [mine / other for mine, other in zip(rates[side], rates[rival], strict=True)]
        split = ", ".join(f"{n[:-2]} {1e3 * statistics.median(v):.0f} ms" for n, v in parts[side].items())
        rows.append([side, common.spread(rates[side], 0), common.spread(ratios), split])
    print("\n".join(common.table(["side", "tokens/s", "ratio in the round", "rank 0's step"], rows)))
    print(f"\nexact, every world size and round: {len(digests)} distinct final state(s)")
    if len(digests) != 1:
        sys.exit("the bits differ")


if __name__ == "__main__":
    main()
