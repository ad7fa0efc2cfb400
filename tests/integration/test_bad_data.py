"""Data files that cannot be trained on: told with file, row and what is allowed, before anything starts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from refusals import Refused

from pipelines.cli import main

ROW = '{"question": "How many?", "answer": "3 #### 3"}\n'
TABLE = "sentence\tlabel\n" + "".join(f"some words {n}\t{'yes' if n % 2 else 'no'}\n" for n in range(20))
LONG_LINE = 5 * 1024 * 1024


def files(folder: Path, train: str | bytes, held_out: str | bytes | None = None) -> list[str]:
    """Overrides that read these files."""
    for name, content in (("train", train), ("eval", train if held_out is None else held_out)):
        (folder / f"{name}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    return ["data.source=files", f"data.root={folder}", "data.train=train.txt", "data.eval=eval.txt"]


def table(form: str = "tsv") -> list[str]:
    return [f"data.format={form}", "task.kind=classification"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "data.train: got 'train.txt'; at least one row"),
        ("\n\n \n", "at least one row"),
        (ROW, "training.batch_size: got 8; at most the 1 training rows"),
        (ROW * 7, "training.batch_size: got 8; at most the 7 training rows"),
        ('{"question": "q"}\n', "columns question, answer; row 1 lacks answer, it has question"),
        (ROW * 9 + '{"question": null, "answer": "1"}\n', "row 10 lacks question, it has answer"),
        (ROW * 9 + '{"question": 3, "answer": "1"}\n', "row 10 has no text in question, but int"),
        (ROW * 9 + '{"question": true, "answer": "1"}\n', "row 10 has no text in question, but bool"),
        (ROW * 9 + '{"question": ["a"], "answer": "1"}\n', "row 10 has no text in question, but list"),
        (ROW * 9 + '{"question": {"a": 1}, "answer": "1"}\n', "row 10 has no text in question, but dict"),
        (ROW * 9 + '{"question": NaN, "answer": "1"}\n', "row 10 has no text in question, but float"),
        (ROW * 9 + '{"question": "a\\u0000b", "answer": "1"}\n', "row 10 has a NUL character in question"),
        (ROW * 9 + '{"question": "a\0b", "answer": "1"}\n', "line 10 is no JSON: Invalid control character"),
        (ROW * 9 + '{"question": "a\\ud800b", "answer": "1"}\n', "row 10 has half a surrogate pair in question"),
        (ROW * 9 + '{"question": \n', "line 10 is no JSON"),
        (ROW * 9 + '{"question": "cut', "line 10 is no JSON: Unterminated string"),
        (ROW * 9 + "[1]\n", "line 10 is no JSON object"),
        (ROW * 9 + '{"a": ' + "[" * 100_000 + "\n", "allowed: jsonl (nested too deeply)"),
        (ROW * 9 + '{"question": "' + "x" * LONG_LINE + '", "answer": "1"}\n', "line 10 is longer than 4,194,304 char"),
        ("x" * LONG_LINE, "line 1 is longer than 4,194,304 characters"),
        (
            ROW.encode() * 9 + b'{"question": "\xff", "answer": "1"}\n',
            "text in data.encoding=utf-8 (invalid start byte",
        ),
        (ROW.encode("utf-16") * 9, "text in data.encoding=utf-8"),
        (gzip.compress(ROW.encode() * 9, mtime=0), "text in data.encoding=utf-8"),
        (ROW.replace("How many?", "How many? " * 100) * 9, "in 9 of 9 the prompt alone fills task.max_length tokens"),
    ],
)
def test_lines_of_json(
    recipe_file: Path, tmp_path: Path, refused: Refused, content: str | bytes, expected: str
) -> None:
    message = refused("train", recipe_file, *files(tmp_path, content))
    assert expected in message
    assert "data.train: got " in message or "training.batch_size" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "allowed: json (Expecting value"),
        ("[]", "at least one row"),
        ("3", "allowed: json (a list of rows, found int)"),
        ('{"question": "q", "answer": "1"}', "allowed: json (a list of rows, found dict)"),
        ("[1, 2, 3]", "row 1 is no object with columns, but int"),
        (f"[[{ROW}]]", "row 1 is no object with columns, but list"),
        (f"[{ROW}, {ROW}", "allowed: json (Expecting ',' delimiter"),
        ("[" * 100_000, "allowed: json (nested too deeply)"),
    ],
)
def test_json(recipe_file: Path, tmp_path: Path, refused: Refused, content: str, expected: str) -> None:
    message = refused("train", recipe_file, *files(tmp_path, content), "data.format=json")
    assert expected in message
    assert "data.train: got " in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "at least one row"),
        ("sentence\tlabel\n", "at least one row"),
        ("a\tb\n" + "x\ty\n" * 9, "columns sentence, label; row 1 lacks sentence, label, it has a, b"),
        ("sentence\tlabel\tlabel\n" + "x\ty\tz\n" * 9, "allowed: tsv (the header names label twice)"),
        (TABLE + "x\tyes\tmore\n", "row 21 has 3 values for 2 columns"),
        (TABLE + "words alone\n", "row 21 lacks label, it has sentence"),
        (TABLE + "words\t\n", "row 21 has no label in label: a text or a whole number, found ''"),
        (TABLE + "a\0b\tyes\n", "row 21 has a NUL character in sentence"),
        (TABLE + "x" * 200_000 + "\tyes\n", "line 22: field larger than field limit"),
        ("sentence\tlabel\n" + "x\ty\n" * 9, "data.labels: got ('y',); two labels or more"),
    ],
)
def test_tables(recipe_file: Path, tmp_path: Path, refused: Refused, content: str, expected: str) -> None:
    for form, text in (("tsv", content), ("csv", content.replace("\t", ","))):
        message = refused("train", recipe_file, *files(tmp_path, text), *table(form))
        assert expected.replace("tsv", form) in message


def test_labels(recipe_file: Path, tmp_path: Path, refused: Refused) -> None:
    unknown = files(tmp_path, TABLE, "sentence\tlabel\nwords\tmaybe\n")
    message = refused("train", recipe_file, *unknown, *table())
    assert "1 problem: data.eval: got ['maybe']; labels in column label: no, yes" in message
    message = refused("train", recipe_file, *files(tmp_path, TABLE), *table(), "data.labels=[a, b]")
    assert "data.train: got ['no', 'yes']; labels in column label: a, b" in message
    assert "data.eval: got ['no', 'yes']; labels in column label: a, b" in message
    fractions = files(tmp_path, '{"sentence": "words", "label": 0.5}\n' * 9)
    message = refused("train", recipe_file, *fractions, "task.kind=classification")
    assert "row 1 has no label in label: a text or a whole number, found 0.5" in message
    alone = files(tmp_path, "yes\nno\n" * 9)
    message = refused("train", recipe_file, *alone, *table("label-text"))
    assert "line 1 has no text after its label" in message
    message = refused("train", recipe_file, *files(tmp_path, TABLE), *table(), "data.text_pair=second")
    assert "columns sentence, second, label; row 1 lacks second" in message


def test_answers_that_can_never_be_right(
    recipe_file: Path, tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture
) -> None:
    without = ROW.replace("#### ", "")
    message = refused("train", recipe_file, *files(tmp_path, ROW * 9, without * 4))
    assert (
        "1 problem: data.eval: got 'eval.txt'; rows with a final answer, such as #### 12, in column answer" in message
    )
    assert "none of 4 has one" in message
    changes = files(tmp_path, ROW * 9, ROW + without)
    assert main(["train", str(recipe_file), *changes, "--dry-run"]) == 0
    assert "note: 1 held-out rows have no final answer" in capfd.readouterr().out


def test_rows_that_are_cut_are_counted(
    recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = ROW.replace("3 ####", "3 and " * 100 + "####")
    lost = ROW.replace("How many?", "How many? " * 100)
    changes = files(tmp_path, ROW * 9 + long * 2 + lost, ROW)
    assert main(["train", str(recipe_file), *changes, "--dry-run", "--json", "plan.json"]) == 0
    note = "3 of 12 training rows are cut at task.max_length=96; nothing is left to learn of 1"
    assert f"note: {note}" in capfd.readouterr().out
    assert json.loads(Path("plan.json").read_text())["estimate"]["notes"] == [note]
    whole = ["task.kind=language-modeling", "data.template='{prompt} {completion}'"]
    for more, cut in ((whole, 3), (["task.kind=classification", "data.text=question", "data.label=answer"], 1)):
        assert main(["train", str(recipe_file), *changes, *more, "--dry-run", "--json", "plan.json"]) == 0
        (note,) = json.loads(Path("plan.json").read_text())["estimate"]["notes"]
        assert note == f"{cut} of 12 training rows are cut at task.max_length=96"


def test_labels_that_are_numbers_are_in_their_order(recipe_file: Path, tmp_path: Path) -> None:
    rows = "".join(f'{{"sentence": "words {n}", "label": {n}}}\n' for n in (10, 2, 1, 0, 11, 9, 8, 7))
    changes = [*files(tmp_path, rows), "task.kind=classification", "training.steps=2", "adapter.target_rank=4"]
    summary = tmp_path / "summary.json"
    assert main(["train", str(recipe_file), *changes, "--json", str(summary)]) == 0
    card = Path(json.loads(summary.read_text())["adapter"], "README.md").read_text()
    assert "0 0, 1 1, 2 2, 3 7, 4 8, 5 9, 6 10, 7 11" in card


def test_columns_of_a_template(recipe_file: Path, tmp_path: Path, refused: Refused) -> None:
    changes = [*files(tmp_path, ROW * 9), "task.kind=language-modeling", "data.template='{prompt} {topic}'"]
    assert "columns question, topic; row 1 lacks topic" in refused("train", recipe_file, *changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["data.train=folder"], "data.train: got '{root}/folder'; allowed: a file that can be read (Is a directory)"),
        (["data.train=missing.txt"], "data.train: got '{root}/missing.txt'; allowed: an existing file"),
        (["data.train=../../etc/passwd"], "data.train: got '../../etc/passwd'; a file below data.root, without .."),
        (["data.train=/etc/passwd"], "data.train: got '/etc/passwd'; a file below data.root"),
        (["data.eval=''"], "data.eval: got ''; a file below data.root"),
        (["data.root={root}/train.txt"], "data.train: got '{root}/train.txt/train.txt'; allowed: "),
        (["data.root={root}/none", "data.eval=other.txt"], "data.eval: got '{root}/none/other.txt'; allowed: an exist"),
        (["data.root=nowhere://x"], "data.root: got 'nowhere://x'; allowed: a path, or a URI that starts with s3://"),
        (["data.root=simplecache::file:///etc"], "data.root: got 'simplecache"),
        (["data.root=s3:///x"], "data.root: got 's3:///x'; allowed: s3://BUCKET/PATH; the bucket is missing"),
        (["data.encoding=ascii", "data.train=accents.txt"], "text in data.encoding=ascii (ordinal not in range(128)"),
    ],
)
def test_places(recipe_file: Path, tmp_path: Path, refused: Refused, changes: list[str], expected: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "accents.txt").write_text(ROW.replace("many", "viele Äpfel"), encoding="utf-8")
    changes = [change.replace("{root}", str(tmp_path)) for change in changes]
    message = refused("train", recipe_file, *files(tmp_path, ROW * 9), *changes)
    assert expected.replace("{root}", str(tmp_path)) in message


def test_a_hub_data_set_that_is_not_there(
    recipe_file: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    changes = ["data.source=hub", "data.root=nobody/nothing", "data.train=train", "data.eval=test"]
    message = refused("train", recipe_file, *changes)
    assert "data.root: got 'nobody/nothing'; the hub name of a data set with split 'train'" in message


def test_a_mark_at_the_start_of_a_file_is_no_part_of_its_first_column(recipe_file: Path, tmp_path: Path) -> None:
    from pipelines.cli import main

    marked = files(tmp_path, b"\xef\xbb\xbf" + TABLE.encode())
    assert main(["train", str(recipe_file), *marked, *table(), "--dry-run"]) == 0
