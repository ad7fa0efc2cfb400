"""Do hypernetworks that one method has trained help another, and the next task?

Φ is trained with ``hyperlora`` once for each update rule. Every target then runs with seeds that the source never saw,
at the same learning rate, in four ways:

    scratch         new hypernetworks
    warm            hypernetwork.init_from, everything learns
    warm-frozen     hypernetwork.init_from, the trunk does not learn
    random-frozen   new hypernetworks whose trunk does not learn: what a frozen trunk costs by itself

Differences are to ``scratch`` with the same seed. Under ``hybrid`` the direct part learns beside the networks;
``anchored`` and ``generate`` have the networks alone. Runs that are finished in ``--out`` are read, not repeated.

    python -m benchmarks.transfer --seeds 3 --rules hybrid,anchored --json benchmarks/results/transfer-quickstart.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

from benchmarks.common import provenance, write_json
from hyperlora import runs
from hyperlora.comparison import interval, smoothed
from hyperlora.config import METHODS, Recipe, RecipeError, parse
from hyperlora.settings import Rule
from hyperlora.training import RunInfo, train
from pipelines.common import load_recipe

SOURCE_METHOD, SOURCE_SEED = "hyperlora", 0
VARIANTS = ("scratch", "warm", "warm-frozen", "random-frozen")
BASELINE = VARIANTS[0]
#: Shares of the run after which the training loss is read.
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Target:
    """A run's recipe and method."""

    recipe: str
    method: str


def build_recipe(target: Target, rule: str, seed: int, overrides: list[str], hypernetwork: dict[str, Any]) -> Recipe:
    """The recipe of one run: one process, no tracking, evaluated and saved at its end."""
    changes = [f"method={target.method}", f"seed={seed}", f"hypernetwork.update={rule}", "mlflow.enabled=false"]
    changes += ["ray.backend=local", "ray.num_workers=1", "training.eval_before=false", "training.keep_checkpoints=1"]
    recipe = load_recipe(target.recipe, [*changes, *overrides]).with_absolute_paths()
    content = recipe.model_dump(mode="json")
    return parse(content | {"hypernetwork": content["hypernetwork"] | hypernetwork})


def run(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The outcome of a run in its folder, which may be finished or begun already.

    Raises:
        RecipeError: the folder is of another recipe.
    """
    info = RunInfo(str(folder.absolute()))
    runs.check_same(info.uri, recipe)
    outcome = runs.result(info.uri)
    if outcome is None:
        runs.record(info, recipe)
        outcome = train(recipe, info)
    return outcome


def at_shares(outcome: dict[str, Any]) -> list[float]:
    """Smoothed training loss after each of :data:`SHARES` of the steps."""
    curve = smoothed(outcome["losses"])
    return [float(curve[max(1, round(share * len(curve))) - 1]) for share in SHARES]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing and compare; prints a line for every run."""
    here = Target(arguments.recipe, SOURCE_METHOD)
    targets = [Target(arguments.recipe, method) for method in arguments.targets]
    targets += [Target(arguments.next, SOURCE_METHOD)] if arguments.next else []
    seeds = range(SOURCE_SEED + 1, SOURCE_SEED + 1 + arguments.seeds)
    sources, trials = {}, []
    for rule in arguments.rules:
        folder = arguments.out / f"source-{rule}"
        outcome = run(build_recipe(here, rule, SOURCE_SEED, arguments.overrides, {}), folder)
        sources[rule] = {"losses": at_shares(outcome), "metric": outcome["metric_after"]}
        print(f"source {rule}: {show_losses(sources[rule]['losses'])}", flush=True)
        ways: dict[str, dict[str, Any]] = {
            "scratch": {},
            "warm": {"init_from": str(folder.absolute())},
            "warm-frozen": {"init_from": str(folder.absolute()), "freeze": "trunk"},
            "random-frozen": {"freeze": "trunk"},
        }
        # Variants take turns within a seed, so that what drifts on the machine hits all alike.
        for target, seed, variant in product(targets, seeds, arguments.variants):
            recipe = build_recipe(target, rule, seed, arguments.overrides, ways[variant])
            name = f"{rule}-{Path(target.recipe).stem}-{target.method}-{variant}-seed{seed}"
            outcome = run(recipe, arguments.out / name)
            trials.append(
                {
                    "rule": rule,
                    "recipe": target.recipe,
                    "method": target.method,
                    "variant": variant,
                    "seed": seed,
                    "losses": at_shares(outcome),
                    "metric": outcome["metric_after"],
                    "held_out_loss": outcome["held_out_loss_after"],
                    "metric_name": outcome["metric"],
                    "lr": recipe.optimizer.lr,
                    "steps": outcome["steps"],
                    "trainable_parameters": outcome["trainable_parameters"],
                    "optimizer_state_bytes": outcome["optimizer_state_bytes"],
                    "warm_start": outcome["warm_start"],
                }
            )
            print(f"{name}: {show_losses(trials[-1]['losses'])}  {outcome['metric_after']:.4f}", flush=True)
    return {"sources": sources, "shares": list(SHARES), "groups": compare(trials), "trials": trials}


def compare(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds and paired differences to ``scratch``, for each rule, recipe, method and variant."""
    groups: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for trial in trials:
        key = tuple(trial[name] for name in ("rule", "recipe", "method", "variant"))
        groups.setdefault(key, {})[trial["seed"]] = trial
    result = []
    for (*where, variant), by_seed in groups.items():
        base = groups.get((*where, BASELINE), {})
        pairs = [(by_seed[seed], base[seed]) for seed in sorted(by_seed.keys() & base.keys())]
        group: dict[str, Any] = dict(zip(("rule", "recipe", "method"), where, strict=True)) | {"variant": variant}
        shares = range(len(SHARES))
        group["losses"] = [interval([t["losses"][n] for t in by_seed.values()]) for n in shares]
        group["loss_differences"] = [interval([a["losses"][n] - b["losses"][n] for a, b in pairs]) for n in shares]
        for key in ("metric", "held_out_loss"):
            group[key] = interval([t[key] for t in by_seed.values()])
            group[f"{key}_difference"] = interval([a[key] - b[key] for a, b in pairs])
        result.append(group)
    return result


def show_losses(losses: list[float]) -> str:
    return "  ".join(f"{loss:.4f}" for loss in losses)


def show(result: dict[str, Any]) -> None:
    """One row for each group: losses at the shares, and the differences to scratch with their intervals."""

    def cell(value: dict[str, Any]) -> str:
        span = "" if value["low"] is None else f" ({value['low']:+.3f} to {value['high']:+.3f})"
        return f"{value['mean']:+.3f}{span}"

    head = [f"loss at {share:.0%}" for share in SHARES]
    print("\n" + "  ".join(f"{h:>13}" for h in head) + "        metric   held-out loss")
    where = None
    for group in result["groups"]:
        if (group["rule"], group["recipe"], group["method"]) != where:
            where = (group["rule"], group["recipe"], group["method"])
            print(f"{' '.join(where)}")
        values = [*group["losses"], group["metric"], group["held_out_loss"]]
        print("  ".join(f"{v['mean']:13.4f}" for v in values) + f"  {group['variant']}")
        if group["variant"] != BASELINE and group["loss_differences"][0]["n"]:
            differences = [*group["loss_differences"], group["metric_difference"], group["held_out_loss_difference"]]
            print("    minus scratch: " + "  ".join(cell(d) for d in differences))


def names(allowed: tuple[str, ...]) -> Any:
    def read(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in found if name not in allowed]
        if unknown or not found:
            raise argparse.ArgumentTypeError(f"{text!r}; allowed, separated by commas: {', '.join(allowed)}")
        return found

    return read


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number, at least 1")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change the recipes of all runs")
    parser.add_argument("--recipe", default="quickstart", help="of the source and the targets (default: quickstart)")
    parser.add_argument("--next", default="quickstart-entailment", help="recipe of the next task; '' for none")
    generated = tuple(name for name, method in METHODS.items() if method.hypernetwork)
    parser.add_argument("--targets", type=names(generated), default=["hyperdora", "hyperdylora"], metavar="A,B")
    parser.add_argument("--rules", type=names(get_args(Rule)), default=["hybrid", "anchored"], metavar="A,B")
    parser.add_argument("--variants", type=names(VARIANTS), default=list(VARIANTS), metavar="A,B")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"), help="folder of the runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        result = measure(arguments)
    except RecipeError as error:
        parser.error(str(error))
    show(result)
    if arguments.json:
        command = shlex.join(["python", "-m", "benchmarks.transfer", *sys.argv[1:]])
        write_json(arguments.json, {"command": command, **result, **provenance()})


if __name__ == "__main__":
    main()
