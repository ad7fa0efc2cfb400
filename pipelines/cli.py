"""The ``hyperlora`` command."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hyperlora.environment import ADDRESS, take_given

#: Commands that can be jobs of a cluster.
JOBS = ("train", "tune", "study", "compare")
DESCRIPTION = "HyperAdaLoRA: low-rank adapters whose rank moves."


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(prog="hyperlora", description=DESCRIPTION, allow_abbrev=False)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--json", metavar="FILE", help="write the summary for scripts")
        command.add_argument("-v", "--verbose", action="store_true", help="show the logs of all parts, Ray's too")
        return command

    train = add("train", "Train one recipe and write its adapter.")
    train.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe (hyperlora recipes) or a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change the recipe")
    train.add_argument("--dry-run", action="store_true", help="validate, print the resolved recipe and the sizes, stop")
    train.add_argument("--resume", action="store_true", help="go on with the newest run of this name")

    compare = add("compare", "Compare methods on one recipe: learning rates searched for each, then several seeds.")
    compare.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe (hyperlora recipes) or a YAML file")
    compare.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change the recipe for all contestants")
    compare.add_argument(
        "--field", default="default", metavar="FIELD", help="a shipped field of contestants, or a file"
    )
    compare.add_argument("--only", default="", metavar="A,B", help="these contestants and the baseline")
    compare.add_argument("--lrs", default="1e-3,2e-3,4e-3,8e-3,1.6e-2", metavar="LR,LR", help="that each tries first")
    compare.add_argument("--seeds", default="5", metavar="N", help="reported at the best rate of each (default: 5)")
    compare.add_argument("--concurrency", default="2", metavar="N", help="trials at a time (default: 2)")
    compare.add_argument("--out", metavar="DIR", help="default: compare-RECIPE in the recipe's storage.uri")
    compare.add_argument("--dry-run", action="store_true", help="validate, print the plan, stop")

    study = add("study", "Run a designed experiment over a search space, with repeats, and say which knob matters.")
    study.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe (hyperlora recipes) or a YAML file")
    study.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change the recipe for all trials")
    study.add_argument("--space", default="pruning", metavar="SPACE", help="a shipped space, a YAML or a Python file")
    study.add_argument("--seeds", default="3", metavar="N", help="repeats of every point (default: 3)")
    study.add_argument(
        "--design", default="fraction", metavar="DESIGN", help="grid, fraction (of the grid; default) or sobol"
    )
    study.add_argument("--points", default="20", metavar="N", help="of fraction and sobol (default: 20)")
    study.add_argument("--metric", metavar="NAME", help="the task's (default), or held_out_loss")
    study.add_argument(
        "--lora-lrs",
        default="1e-3,2e-3,4e-3,8e-3,1.6e-2",
        metavar="LR,LR",
        help="that uniform LoRA tries first; none: it does not run",
    )
    study.add_argument("--concurrency", default="2", metavar="N", help="trials at a time (default: 2)")
    study.add_argument("--out", metavar="DIR", help="default: study-RECIPE-SPACE in the recipe's storage.uri")
    study.add_argument("--dry-run", action="store_true", help="validate, print plan and cost, stop")

    tune = add("tune", "Search a space for the best setting, with early stopping.")
    tune.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe (hyperlora recipes) or a YAML file")
    tune.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change the recipe for all trials")
    tune.add_argument("--space", default="joint", metavar="SPACE", help="a shipped space, a YAML or a Python file")
    tune.add_argument("--trials", default="50", metavar="N", help="in all (default: 50)")
    tune.add_argument("--sampler", default="tpe", metavar="NAME", help="tpe (default), random or grid")
    tune.add_argument("--metric", metavar="NAME", help="to be searched for: the task's (default), or held_out_loss")
    tune.add_argument(
        "--objectives", default="metric", metavar="A,B", help="metric, rank, seconds; several: no early stopping"
    )
    tune.add_argument(
        "--stop-on", default="held_out_loss", metavar="NAME", help="metric of early stopping (held_out_loss), or none"
    )
    tune.add_argument("--evaluations", metavar="N", help="of a whole trial, if the recipe says nothing (default: 8)")
    tune.add_argument("--seed", default="1", metavar="N", help="of the sampler (default: 1)")
    tune.add_argument("--workers", default="1", metavar="N", help="of one trial (default: 1, in its process)")
    tune.add_argument("--concurrency", metavar="N", help="trials at a time, at most (default: as the cluster holds)")
    tune.add_argument("--out", metavar="DIR", help="default: tune-RECIPE-SPACE in the recipe's storage.uri")
    tune.add_argument("--dry-run", action="store_true", help="validate, print plan and cost, stop")

    register = add("register", "Register the best adapter of a run, study or search in MLflow's model registry.")
    register.add_argument("source", metavar="STUDY_OR_RUN", help="folder or URI of a run, study or search")
    register.add_argument("--name", required=True, metavar="NAME", help="of the registered model")
    register.add_argument("--metric", metavar="NAME", help="default: the study's or search's own, or the task's")
    register.add_argument(
        "--non-inferior", metavar="MARGIN", help="take the smallest adapter whose metric is at most this much worse"
    )
    register.add_argument("--tracking-uri", metavar="URI", help="of MLflow (default: the recipe's)")

    pull = add("pull", "Write a registered adapter into a folder, as plain PEFT loads it.")
    pull.add_argument("model", metavar="MODEL", help="models:/NAME@champion, another alias, or models:/NAME/VERSION")
    pull.add_argument("folder", metavar="DIR", help="new folder or URI")
    pull.add_argument(
        "--tracking-uri", metavar="URI", help="of MLflow (default: MLFLOW_TRACKING_URI, or mlflow.db here)"
    )

    def on_cluster(name: str, text: str) -> argparse.ArgumentParser:
        command = add(name, text)
        known = os.environ.get(ADDRESS)
        command.add_argument(
            "--address",
            required=name != "submit" and not known,
            default=None if name == "submit" else known,
            metavar="URL",
            help=f"of the dashboard: http://HOST:8265 (default: {ADDRESS})",
        )
        return command

    submit = on_cluster("submit", "Run train, tune, study or compare on a Ray cluster, as a job.")
    submit.usage = "hyperlora submit train|tune|study|compare RECIPE [its options] --address URL [options]"
    submit.add_argument("--no-follow", action="store_true", help="print the job's id and come back")
    submit.add_argument("--env", default="", metavar="NAME,NAME", help="variables of here whose values the job gets")
    submit.add_argument(
        "--install", action="store_true", help="install the dependencies on the nodes, as they are here"
    )

    on_cluster("jobs", "List the jobs of a cluster.")
    logs = on_cluster("logs", "Show the output of a job.")
    logs.add_argument("job", metavar="ID")
    logs.add_argument("--follow", action="store_true", help="until it ends; exit with its status")
    stop = on_cluster("stop", "Let a job save a checkpoint, and end it.")
    stop.add_argument("job", metavar="ID")

    add("deliver", "Send MLflow what it missed of runs that ended on this machine while it was away.")

    doctor = add("doctor", "Try out all that a run needs, here or on a cluster, and say what to do.")
    doctor.add_argument("recipe", nargs="?", default="quickstart", metavar="RECIPE", help="whose storage and MLflow")
    doctor.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change the recipe")
    doctor.add_argument("--address", metavar="URL", help="of a cluster's dashboard: every node is tried as well")
    doctor.add_argument("--env", default="", metavar="NAME,NAME", help="variables of here whose values the nodes get")
    doctor.add_argument("--install", action="store_true", help="install the dependencies on the nodes first")
    doctor.add_argument("--expect", help=argparse.SUPPRESS)  # in the cluster: versions of who asks, as JSON

    add("recipes", "List the recipes that ship with the package.")

    export = add("export", "Write the adapter of a run or checkpoint as a plain PEFT LoRA folder.")
    export.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", help="folder or URI; also a trial's, or one that pull has written"
    )
    export.add_argument("folder", metavar="DIR", help="new folder or URI")
    export.add_argument("--uniform-rank", action="store_true", help="pad all modules to one rank that vLLM accepts")
    return root


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; options may stand between overrides, which argparse allows no subcommand by itself."""
    root = parser()
    args, more = root.parse_known_args(argv)
    if "env" in args:
        args.env = [name.strip() for name in args.env.split(",") if name.strip()]
    if args.command == "submit":
        args.words = more
        if not more or more[0] not in JOBS:
            root.error(f"submit: the job has to begin with one of: {', '.join(JOBS)}")
        return args
    strange = [a for a in more if a.startswith("-") or "overrides" not in args]
    if strange:
        root.error(f"unrecognized arguments: {' '.join(strange)}")
    if more:
        args.overrides += more
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends with status 2 and all that is wrong, Ctrl-C with 130, SIGTERM with 143."""
    take_given()
    args = parse_arguments(argv)
    console = Console()
    _quiet(args.verbose)
    from hyperlora import tokens

    address = getattr(args, "address", None)
    if args.command == "submit" or address is not None:
        tokens.use()
    # A submitted recipe may say where it goes.
    if args.command != "submit" and address is not None and (told := tokens.warning(address)):
        console.print(Text(told, "yellow"), soft_wrap=True)
    from hyperlora.config import RecipeError
    from hyperlora.stopping import NonFiniteError, StoppedError, TerminatedError, terminable
    from hyperlora.storage import StorageError

    try:
        with terminable():
            return _run(args, console)
    except RecipeError as error:
        _complain(str(error))
        return 2
    except StoppedError as error:
        _complain(str(error))
        return 128 + signal.SIGTERM
    except StorageError as error:
        if args.verbose:
            raise
        _complain(f"the store does not answer: {error}")
        return 1
    except (NonFiniteError, RuntimeError) as error:
        if args.verbose:
            raise
        _complain(str(error))
        return 1
    except KeyboardInterrupt as error:
        goes_on = "goes on from the last checkpoint"
        again = dict.fromkeys(("compare", "study", "tune"), f"; the same command {goes_on}")
        again["train"] = f"; the same command with --resume {goes_on}, if there is one"
        _complain(f"interrupted{again.get(args.command, '')}")
        return 128 + (signal.SIGTERM if isinstance(error, TerminatedError) else signal.SIGINT)


def _run(args: argparse.Namespace, console: Console) -> int:
    from pipelines.common import check_json, find_recipe

    check_json(args.json)
    if args.command == "train":
        find_recipe(args.recipe)  # before seconds of imports; others have options with problems of their own
        from pipelines import train

        return train.main(args, console)
    if args.command == "compare":
        from pipelines import compare

        return compare.main(args, console)
    if args.command == "study":
        from pipelines import study

        return study.main(args, console)
    if args.command == "tune":
        from pipelines import tune

        return tune.main(args, console)
    if args.command == "export":
        from pipelines import export

        return export.main(args, console)
    if args.command == "submit":
        from pipelines import submit

        return submit.main(args, parse_arguments(args.words), console)
    if args.command == "deliver":
        from pipelines import deliver

        return deliver.main(args, console)
    if args.command == "doctor":
        from pipelines import doctor

        return doctor.main(args, console)
    if args.command in ("jobs", "logs", "stop"):
        from pipelines import submit

        return {"jobs": submit.listing, "logs": submit.logs, "stop": submit.stop}[args.command](args, console)
    if args.command in ("register", "pull"):
        from pipelines import register

        return (register.main if args.command == "register" else register.pull)(args, console)
    return recipes(args, console)


def _complain(text: str) -> None:
    Console(stderr=True).print(Text(text, style="red"), soft_wrap=True)


def _quiet(verbose: bool) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO)
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


def recipes(args: argparse.Namespace, console: Console) -> int:
    """List the shipped recipes."""
    from hyperlora.config import parse, read_yaml
    from pipelines.common import shipped, write_json

    found = {name: parse(read_yaml(path)) for name, path in shipped().items()}
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for column in ("recipe", "base model", "what it does"):
        table.add_column(column, overflow="fold")
    for name, recipe in found.items():
        table.add_row(f"[bold]{name}[/]", recipe.model.path, recipe.description)
    console.print(table)
    rows = [{"name": n, "model": r.model.path, "description": r.description} for n, r in found.items()]
    write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
