"""Success at held-out prompts of `examples/align`, from the distilled student through each round, over seeds.

    python benchmarks/align_study.py OUT [--seeds 3] [--sft ce mix]

An arm is a loss of the fine-tuning. Prints one line per arm and model: the share of sampled answers that do what the
prompt asks (4 answers to each of the held-out prompts at temperature 1): mean and standard deviation over the seeds,
the paired difference from the model before, and how many seeds it has the sign of; and the last round's distance
KL(start || model) in nats per response, on the pairs held out from it. Run `python examples/align/tasks.py
runs/align-data` and `make runs/corpus` first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import torch
import yaml

from minitron_megatron.align import AnswerSettings, make_pairs
from minitron_megatron.convert import load_hf
from minitron_megatron.errors import DataError
from minitron_megatron.events import Event
from minitron_megatron.files import read_json, write_json
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import SharedStages, run

EXAMPLE = Path(__file__).parents[1] / "examples" / "align"
MODELS = ("distilled", "aligned-1", "aligned-2", "aligned-3")
LABELS = {"distilled": "distilled", "aligned-1": "sft", "aligned-2": "rpo", "aligned-3": "rpo again"}


def success(folder: Path, tokenizer: Path, held_out: Path, topology: Topology) -> float:
    """Return the mean reward of a model's answers to the held-out prompts."""
    settings = AnswerSettings(prompts=str(held_out), reward="follows", answers=4, max_tokens=16, micro_batch=64)
    with TemporaryDirectory() as scratch:
        where = (tokenizer, Path(scratch) / "pairs.jsonl", Path(scratch) / "parts")
        try:
            return make_pairs(load_hf(folder, topology), topology, settings, *where, seed=7)["mean_reward"]
        except DataError:  # no pair: all answers to every prompt have the same reward
            parts = [json.loads(path.read_text()) for path in sorted(where[2].rglob("*.json"))]
            return mean(reward for part in parts for each in part for reward in each["rewards"])


def aligned(recipe: Path, topology: Topology, shared: SharedStages) -> float:
    """Run a recipe up to its last round; return that round's KL(start || model) on held-out pairs.

    shared: arms share what they have in common, such as distillation.
    """
    loaded, found = load_recipe(recipe), list[float]()

    def listen(event: Event) -> None:
        found.extend(value for name, value in event.values.items() if name == "validation_kl_to_reference")

    run(loaded, topology, until="align", shared=shared, listener=listen)
    kept = loaded.out / "distance.json"  # of an earlier call, which left nothing to do
    if found:
        write_json(kept, found[-1])
    return float(read_json(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft", nargs="+", default=["ce", "mix"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    topology = Topology.start()
    keys = yaml.safe_load((EXAMPLE / "recipe.yaml").read_text())
    for loss in asked.sft:
        found: dict[str, list[float]] = {model: [] for model in MODELS}
        far = []
        for seed in range(1, asked.seeds + 1):
            out = asked.out / f"{loss}-{seed}"
            rounds = [keys["align"][0] | {"loss": loss}, *keys["align"][1:]]
            file = asked.out / f"{loss}-{seed}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(keys | {"out": str(out), "seed": seed, "align": rounds, "plugins": []}))
            far.append(aligned(file, topology, SharedStages(asked.out / "shared")))
            data = Path(keys["model"])
            for model in MODELS:
                found[model].append(success(out / model, data, data.parent / "held_out.jsonl", topology))
            print(f"{loss} seed {seed}: " + ", ".join(f"{LABELS[m]} {found[m][-1]:.3f}" for m in MODELS), flush=True)
        before = None
        for model, rates in found.items():
            line = f"{loss} {LABELS[model]}: {mean(rates):.3f} +- {stdev(rates):.3f}"
            if before is not None:
                steps = [new - old for new, old in zip(rates, before, strict=True)]
                line += (
                    f", {mean(steps):+.3f} from the model before ({sum(step > 0 for step in steps)} of {len(steps)} up)"
                )
            print(line, flush=True)
            before = rates
        print(f"{loss}: KL(start || model) of the last round {mean(far):.2f} nats a response", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(EXAMPLE))
    import tasks  # noqa: F401 (adds the reward)

    main()
