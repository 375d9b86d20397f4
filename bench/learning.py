"""Every core algorithm on the same budget: does it learn, and what does it keep?

    python bench/learning.py --jobs 2                              half an hour on two cores; goes on where it stopped
    python bench/learning.py --jobs 2 --set extended --seeds 0

The built-in model on Countdown, the same number of responses per step for all, three seeds each; a run of its own
folder for each, by the command that a person would type. Prints and writes a table (mean over seeds of the held-out
pass@1 and pass@8, distinct solutions, generated tokens, wall time) and the curves: results/learning*.md, .json, .png.
An algorithm whose pass@1 does not rise by more than twice its standard error is named at the end, and the exit code is
1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from common import _commit

from pymathrl import devices
from pymathrl.errors import UserError
from pymathrl.report import group_runs, plot_comparison, read_run

RESULTS = Path(__file__).parent / "results"
# label -> options. Each draws 512 responses a step, as the built-in model's preset does: 64 problems x 8, 512 x 1, ...
CORE = {
    "rover": "--algo rover",
    "grpo": "--algo grpo",
    "dr_grpo": "--algo dr_grpo",
    "dapo": "--algo dapo",
    "gspo": "--algo gspo",
    "cispo": "--algo cispo",
    "rloo": "--algo rloo",
    "reinforce_pp": "--algo reinforce_pp",
    "reinforce_pp, baseline": "--algo reinforce_pp --rf-baseline group --samples-per-prompt 8 --prompts-per-step 64",
    "ppo": "--algo ppo",
    "spo": "--algo spo",
    "soft_tokens": "--algo soft_tokens",
    "soft_tokens, hard": "--algo soft_tokens --cot-mode hard --lr 4e-4",
    "lp_reg": "--algo lp_reg",
    "cure": "--algo cure --prompts-per-step 32",
    "grpo, filtered": "--algo grpo --filter band",
}
EXTENDED = {
    "guide": "--algo guide",
    "hapo": "--algo hapo",
    "thr": "--algo thr",
    "campo": "--algo campo",
    "mgpo": "--algo mgpo",
    "acereason": "--algo acereason",
    "rlp": "--algo rlp --prompts-per-step 32",
    "tango": "--algo tango",
    "retool": "--algo retool",
    "tapo": "--algo tapo",
    "parallel_r1": "--algo parallel_r1 --max-new-tokens 96",
    "satori": "--algo satori",
    "vogue": "--algo vogue",
    "acre": "--algo acre",
}
SETS = {"core": CORE, "extended": EXTENDED}


@dataclass(frozen=True)
class Job:
    label: str
    seed: int
    folder: Path
    command: list[str]

    def run(self) -> str:
        """Runs or resumes; "" when it ended well, else the last line of what it said."""
        if (self.folder / "summary.json").exists():
            return ""
        started = (self.folder / "config.toml").exists()
        command = [sys.executable, "-m", "pymathrl.train"]
        command += ["--resume", str(self.folder)] if started else [*self.command, "--out", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def jobs(args: argparse.Namespace) -> list[Job]:
    common = ["--steps", str(args.steps), "--eval-every", str(max(1, args.steps // 3)), "--eval-problems",
              str(args.problems), "--eval-samples", "8", "--eval-problems-during", "128", "--eval-samples-during", "8",
              "--checkpoint-every", str(args.steps), "--samples-per-step", "1",
              "--threads", str(max(1, len(os.sched_getaffinity(0)) // args.jobs))]  # fmt: skip
    known = SETS[args.set]
    chosen = args.runs or list(known)
    for label in chosen:
        if label not in known:
            raise UserError(f"--runs: expected some of {', '.join(map(repr, known))}, got {label!r}")
    return [
        Job(
            label,
            seed,
            args.out / label.replace(", ", "-") / f"seed{seed}",
            [*known[label].split(), "--seed", str(seed), *common],
        )
        for seed in args.seeds
        for label in chosen
    ]


def table(done: list[Job]) -> tuple[str, list[dict[str, object]], list[str]]:
    """(Markdown, a record per label, labels that did not learn)."""
    rows, records, flat = [], [], []
    for label in dict.fromkeys(job.label for job in done):
        runs = [json.loads((job.folder / "summary.json").read_text()) for job in done if job.label == label]
        before, after = ([run[when] for run in runs] for when in ("before", "after"))
        gains = [b["pass@1"] - a["pass@1"] for a, b in zip(before, after, strict=True)]
        # of the gain: between seeds, and at least that of one evaluation's problems
        spread = max(stdev(gains) if len(gains) > 1 else 0.0, after[0]["pass@1_se"])
        error = spread / len(gains) ** 0.5
        record = {
            "algorithm": label, "seeds": len(runs), "steps": runs[0]["steps"], "gain": mean(gains), "gain_se": error,
            **{f"{k} {w}": mean(e[k] for e in es) for w, es in (("before", before), ("after", after))
               for k in ("pass@1", "pass@8", "diversity")},
            "tokens": mean(run["tokens"] for run in runs), "wall_s": mean(run["wall_s"] for run in runs),
        }  # fmt: skip
        records.append(record)
        if record["gain"] <= 2 * error:
            flat.append(label)
        each = ", ".join(f"{e['pass@1']:.1%}" for e in after)
        rows.append(
            f"| {label} | {record['pass@1 before']:.1%} → **{record['pass@1 after']:.1%}** ({each}) | "
            f"{record['pass@8 before']:.1%} → {record['pass@8 after']:.1%} | {record['diversity after']:.3f} | "
            f"{record['tokens'] / 1e6:.2f} | {record['wall_s']:.0f} |"
        )
    head = "| algorithm | pass@1 (each seed) | pass@8 | diversity | tokens (M) | wall (s) |\n"
    head += "|---|---|---|---|---:|---:|\n"
    return head + "\n".join(rows) + "\n", records, flat


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="folder of the runs [runs/learning]")
    parser.add_argument("--set", choices=SETS, default="core", help="which algorithms [core]")
    parser.add_argument("--steps", type=int, default=20, help="rollout-and-update steps of each run [20]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--problems", type=int, default=256, help="held-out problems before and after, 8 samples [256]")
    parser.add_argument("--runs", nargs="+", metavar="LABEL", help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; each gets its share of the cores [1]")
    args = parser.parse_args()
    try:
        todo = jobs(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    begin, failed = time.monotonic(), []
    with ThreadPoolExecutor(args.jobs) as pool:
        for number, (job, fault) in enumerate(zip(todo, pool.map(Job.run, todo), strict=True), 1):
            seconds = time.monotonic() - begin
            print(f"{number}/{len(todo)}  {seconds:6.0f} s  {job.label}, seed {job.seed}  {fault}", flush=True)
            if fault:
                failed.append(job)
    done = [job for job in todo if job not in failed]
    if not done:
        return 1
    text, records, flat = table(done)
    where = f"{devices.processor()}, commit {_commit()}, {args.jobs} runs at once, {args.steps} steps of 512 responses"
    RESULTS.mkdir(exist_ok=True)
    name = "learning" if args.set == "core" else f"learning-{args.set}"
    (RESULTS / f"{name}.md").write_text(f"{where}\n\n{text}")
    (RESULTS / f"{name}.json").write_text(json.dumps({"where": where, "rows": records}, indent=1) + "\n")
    picture = plot_comparison(group_runs([read_run(job.folder, job.label) for job in done]), RESULTS)
    picture.replace(RESULTS / f"{name}.png")
    print(text)
    for label in flat:
        print(f"not shown to learn: {label}: its gain is within twice its standard error")
    return 1 if failed or flat else 0


if __name__ == "__main__":
    sys.exit(main())
