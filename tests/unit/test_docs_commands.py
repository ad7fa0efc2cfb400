"""What README.md, docs/ and infra/ say to type is taken by the real parsers, and the files that they name are there."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from hyperlora.config import apply_overrides, parse, read_yaml
from pipelines.cli import parse_arguments
from pipelines.common import shipped

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
PAGES = [ROOT / "README.md", INFRA / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Files whose comments have commands, indented by three.
COMMENTED = [INFRA / "Dockerfile", INFRA / "compose.yaml", *sorted((INFRA / "kuberay").glob("*.yaml"))]
PROGRAMS = ("hyperlora", "ray", "python", "docker", "kubectl", "cp")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
CLUSTER = yaml.safe_load((INFRA / "kuberay/raycluster.yaml").read_text())
JOB = yaml.safe_load((INFRA / "kuberay/rayjob.yaml").read_text())


def blocks(text: str) -> list[str]:
    """The lines of a page's blocks of code; one that goes on in the next is joined with it."""
    fenced = [block for language, block in FENCED.findall(text) if language in ("", "bash")]
    indented = re.findall(r"^ {4}(\S.*(?:\n {8,}\S.*)*)", FENCED.sub("", text), re.MULTILINE)
    return re.sub(r"\\?\n {4,}", " ", "\n".join([*fenced, *indented])).splitlines()


def spans(text: str) -> list[str]:
    """What stands in backticks within sentences and tables."""
    prose = re.sub(r"^ {4}.*$", "", FENCED.sub("", text), flags=re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(line: str) -> Iterator[list[str]]:
    """Words of the commands in a line, without what the shell takes: variables, pipes, files of output, comments."""
    yield from (found for inner in re.findall(r"\$\(([^()]*)\)", line) for found in commands(inner))
    for part in line.split(" | "):
        part = re.sub(r"^(?:\w+=\S* )*", "", part)
        if part.split(" ", 1)[0] in PROGRAMS:
            part = re.sub(r"(?<= )\[([^]]*)\]", r"\1", part)  # words that may be left out
            yield [word for word in shlex.split(part, comments=True) if not word.startswith(">")]


def told() -> Iterator[tuple[Path, list[str]]]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        yield from ((page, words) for line in blocks(text) for words in commands(line))
        # A command's name alone, as in `ray up`, is no command.
        yield from ((page, words) for line in spans(text) for words in commands(line) if not named(words))
    for file in COMMENTED:
        comments = re.findall(r"^#   (\S.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        yield from ((file, words) for line in comments for words in commands(line))


def named(words: list[str]) -> bool:
    return words[0] != "cp" and all(re.fullmatch(r"[a-z][a-z-]*", word) for word in words)


TOLD = list(told())


def those(program: str) -> list[Any]:
    """Parameters of a test: the page, and the words behind the program."""
    return [
        pytest.param(page, words[1:], id=f"{page.relative_to(ROOT)}: {' '.join(words)}")
        for page, words in TOLD
        if words[0] == program
    ]


def test_commands_are_found() -> None:
    assert set(PAGES) - {page for page, _ in TOLD} == {ROOT / "docs/security.md"}
    assert {words[0] for _, words in TOLD} == set(PROGRAMS)
    one = "X=1 hyperlora study A [b=c …] [--seeds 3] # more"
    assert list(commands(one)) == [["hyperlora", "study", "A", "b=c", "…", "--seeds", "3"]]
    assert list(commands("export X=$(ray stop)")) == [["ray", "stop"]]
    assert list(commands("kubectl get pod | ray status >/dev/null")) == [["kubectl", "get", "pod"], ["ray", "status"]]
    joined = blocks("a\n\n    one \\\n        two\n\n```bash\nthree \\\n    four\n```\n")
    assert [" ".join(line.split()) for line in joined if line] == ["three four", "one two"]


@pytest.mark.parametrize(("page", "words"), those("hyperlora"))
def test_this_package_takes_its_commands(page: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    for address in re.findall(r"export RAY_API_SERVER_ADDRESS=(\S+)", page.read_text(encoding="utf-8")):
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    args = parse_arguments(words)
    if args.command == "submit":
        args = parse_arguments(args.words)
    if "recipe" in args:
        theirs = re.fullmatch(r"[A-Z_]+|my\.yaml|…", args.recipe)  # a recipe of the reader's
        path = ROOT / args.recipe if "/" in args.recipe else shipped()["quickstart" if theirs else args.recipe]
        given = [o for o in args.overrides if not re.search(r"…|^key\.sub=|=[A-Z]$", o)]
        parse(apply_overrides(read_yaml(path), given))
    if "space" in args:
        assert (ROOT / f"tune_spaces/{args.space}.py").is_file()
    if "field" in args:
        assert args.field in {*shipped("fields"), "FIELD"}


@pytest.mark.parametrize(("page", "words"), those("ray"))
def test_ray_takes_its_commands(page: Path, words: list[str]) -> None:
    from ray.scripts.scripts import cli

    name, command, rest = cli.resolve_command(click.Context(cli), words)
    assert command is not None
    command.make_context(name, rest)


@pytest.mark.parametrize("name", sorted({w for p in PAGES for w in re.findall(r"`ray ([a-z-]+)`", p.read_text())}))
def test_ray_has_the_commands_that_are_named(name: str) -> None:
    from ray.scripts.scripts import cli

    assert name in cli.commands


@pytest.mark.parametrize(("page", "words"), those("python"))
def test_modules_and_their_options_are_there(page: Path, words: list[str]) -> None:
    if words[0] == "-c":
        compile(words[1], "shown", "exec")
        return
    assert words[0] == "-m"
    text = (ROOT / f"{words[1].replace('.', '/')}.py").read_text(encoding="utf-8")
    for option in (w for w in words if w.startswith("--")):
        assert f'"{option}"' in text, option


def docker() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(allow_abbrev=False)
    programs = root.add_subparsers(dest="program", required=True)
    build = programs.add_parser("build", allow_abbrev=False)
    build.add_argument("-f", "--file", required=True)
    build.add_argument("-t", "--tag", required=True)
    build.add_argument("--build-arg", action="append", default=[])
    build.add_argument("context")
    compose = programs.add_parser("compose", allow_abbrev=False)
    compose.add_argument("-f", "--file", action="append", required=True)
    compose.add_argument("--env-file", required=True)  # without it no secret has a value
    verbs = compose.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", allow_abbrev=False)
    up.add_argument("-d", "--detach", action="store_true")
    up.add_argument("--wait", action="store_true")
    up.add_argument("--build", action="store_true")
    verbs.add_parser("logs", allow_abbrev=False).add_argument("services", nargs="*")
    verbs.add_parser("down", allow_abbrev=False)
    inside = verbs.add_parser("exec", allow_abbrev=False)
    inside.add_argument("service")
    inside.add_argument("command", nargs=argparse.REMAINDER)
    copy = verbs.add_parser("cp", allow_abbrev=False)
    copy.add_argument("source")
    copy.add_argument("target")
    return root


@pytest.mark.parametrize(("page", "words"), those("docker"))
def test_docker_finds_what_its_commands_name(page: Path, words: list[str]) -> None:
    args = docker().parse_args(words)
    if args.program == "compose":
        first, *others = [yaml.safe_load((ROOT / file).read_text()) for file in args.file]
        assert first == COMPOSE
        assert all(other["services"].keys() <= COMPOSE["services"].keys() for other in others)
        assert args.env_file == "infra/.env", "the file that is made of env.example, and kept out of git"
        assert set(getattr(args, "services", [])) <= set(COMPOSE["services"])
        # Else the image stays that of an older checkout; decisions.md tells what was run once.
        assert args.verb != "up" or args.build or page.name == "decisions.md"
        if args.verb == "exec":
            assert args.service in COMPOSE["services"]
            assert args.command[0] == "hyperlora"
            parse_arguments(args.command[1:])
    else:
        known = re.findall(r"^ARG (\w+)", (ROOT / args.file).read_text(), re.MULTILINE)
        assert {value.partition("=")[0] for value in args.build_arg} <= set(known)


def kubectl() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(allow_abbrev=False)
    verbs = root.add_subparsers(dest="verb", required=True)
    for verb in ("apply", "delete"):
        verbs.add_parser(verb, allow_abbrev=False).add_argument("-f", "--filename", required=True)
    get = verbs.add_parser("get", allow_abbrev=False)
    get.add_argument("kind")
    get.add_argument("name")
    get.add_argument("-o", "--output")
    get.add_argument("--template")
    logs = verbs.add_parser("logs", allow_abbrev=False)
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("of")
    verbs.add_parser("exec", allow_abbrev=False).add_argument("of")
    forward = verbs.add_parser("port-forward", allow_abbrev=False)
    forward.add_argument("of")
    forward.add_argument("port", type=int)
    create = verbs.add_parser("create", allow_abbrev=False)
    create.add_argument("what", nargs=2)
    create.add_argument("name")
    create.add_argument("--from-literal", action="append", required=True)
    return root


@pytest.mark.parametrize(("page", "words"), those("kubectl"))
def test_kubectl_finds_what_its_commands_name(page: Path, words: list[str]) -> None:
    inner = words[words.index("--") + 1 :] if "--" in words else []
    args = kubectl().parse_args(words[: words.index("--")] if inner else words)
    head = CLUSTER["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    (store,) = (source["secretRef"]["name"] for source in head["envFrom"])
    cluster, job = CLUSTER["metadata"]["name"], JOB["metadata"]["name"]
    made = {
        "service": {f"{cluster}-head-svc", "$HEAD"},  # that of a RayJob has a name of its own at every start
        "job": {job},  # which submits
        "rayjob": {job},
        "raycluster": {cluster},
        "secret": {cluster, store},
    }
    if "filename" in args:
        assert args.filename == "-" or (ROOT / args.filename).is_file()
    if "kind" in args:
        assert args.name in made[args.kind]
    if "of" in args:
        kind, _, name = args.of.partition("/")
        assert name in made[kind]
    if "port" in args:
        assert args.port in {p["containerPort"] for p in head["ports"]}
    if args.verb == "create":
        assert (args.what, args.name) == (["secret", "generic"], store)
        assert {pair.partition("=")[0] for pair in args.from_literal} == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    if inner:
        assert inner[0] == "hyperlora"
        parse_arguments(inner[1:])


@pytest.mark.parametrize(("page", "words"), those("cp"))
def test_what_is_copied_is_there(page: Path, words: list[str]) -> None:
    assert (ROOT / words[0]).is_file()


def test_the_job_that_goes_on_is_the_job_with_resume() -> None:
    (old, new) = re.findall(r"sed 's/(.+?)/(.+?)/' infra/kuberay/rayjob\.yaml", (INFRA / "README.md").read_text())[0]
    text = (INFRA / "kuberay/rayjob.yaml").read_text().replace(old, new.replace("&", old))
    spec = yaml.safe_load(text)["spec"]
    args = parse_arguments(spec["entrypoint"].split()[1:])
    assert args.resume
    assert parse_arguments([*JOB["spec"]["entrypoint"].split()[1:], "--resume"]) == args
    assert spec | {"entrypoint": ""} == JOB["spec"] | {"entrypoint": ""}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "benchmarks|docs|hyperlora|infra|pipelines|tests|tune_spaces"
    told = re.findall(rf"(?<![\w./:-])(?:{folders})/[\w./-]*\w/?(?![\w…*{{<])", FENCED.sub("", text))
    made = {"infra/.env"}
    assert not [name for name in told if name not in made and not (ROOT / name).exists()]
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert not [target for target in links if not (page.parent / target).exists()]
