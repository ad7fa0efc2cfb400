"""The generated rows and the small model that ships with the package."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperlora.adapters import resolve_path
from hyperlora.tasks.generated import (
    LABELS,
    LIMITS,
    NAMES,
    THINGS,
    Row,
    Split,
    _split_of,
    entailment_pairs,
    pretraining_text,
    word_problems,
)
from hyperlora.tasks.generation import final_answer
from pipelines.pretrain import packed, parse, pretrain

SPLITS: tuple[Split, ...] = ("train", "heldout")
ASSET = Path(resolve_path("builtin:storylm"))
GAINS = (
    r"{name} gets \d+ \w+ from \w+\.",
    r"{name} (finds|buys|makes) \d+ \w+\.",
)
LOSSES = (
    r"{name} gives \d+ \w+ to \w+\.",
    r"{name} (loses|sells|drops) \d+ \w+\.",
)


# -------------------------------------------------------------------- what every generator keeps


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("make", [word_problems, entailment_pairs])
def test_rows_follow_from_the_seed(make, split):
    assert make(50, 3, split) == make(50, 3, split)
    assert make(50, 3, split) != make(50, 4, split)
    assert len(make(50, 3, split)) == 50
    assert make(0, 3, split) == []


def test_pretraining_text_follows_from_the_seed():
    assert pretraining_text(50, 3) == pretraining_text(50, 3)
    assert pretraining_text(50, 3) != pretraining_text(50, 4)
    assert pretraining_text(50, 3) == pretraining_text(80, 3)[:50]


def test_rows_are_the_same_on_every_python():
    """Golden rows: a change of the generator, or of Python's, shows here."""
    assert word_problems(1, 0, "train") == [
        {
            "question": "Jack has 10 nuts. Jack finds 9 nuts. Jack loses 9 nuts. How many nuts does Jack have now?",
            "answer": "10 + 9 = 19, 19 - 9 = 10 #### 10",
        }
    ]
    assert entailment_pairs(1, 0, "heldout") == [
        {
            "sentence1": "Hugo has 15 lamps from Eva.",
            "sentence2": "Hugo has more than 12 lamps.",
            "label": "entailment",
        }
    ]
    assert pretraining_text(1, 0) == [
        "Iris has 10 coins. Kate has 17 coins. Iris has fewer coins than Kate. "
        "Kate has more coins than Iris. Kate has more than 10 coins. Iris has fewer than 17 coins."
    ]


@pytest.mark.parametrize(("make", "key"), [(word_problems, "question"), (entailment_pairs, "sentence1")])
def test_splits_share_no_question_whatever_the_seed(make, key):
    train = {row[key] for seed in range(3) for row in make(2000, seed, "train")}
    held_out = {row[key] for seed in range(3) for row in make(1000, seed, "heldout")}
    assert not train & held_out


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("make", "keys"), [(word_problems, ["question"]), (entailment_pairs, ["sentence1", "sentence2"])]
)
def test_no_row_twice(make, keys, split):
    rows = make(4000, 1, split)
    assert len({tuple(row[key] for key in keys) for row in rows}) == 4000


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("make", [word_problems, entailment_pairs])
def test_counts_that_cannot_be_made_are_refused_with_the_limit(make, split):
    for n in (LIMITS[split] + 1, -1):
        with pytest.raises(ValueError, match=f"{n}.*{LIMITS[split]:,}"):
            make(n, 0, split)


@pytest.mark.parametrize("make", [word_problems, entailment_pairs])
def test_an_unknown_split_is_refused(make):
    with pytest.raises(ValueError, match=r"test.*train, heldout"):
        make(1, 0, "test")


def test_as_many_rows_as_stated_can_be_made():
    assert len(word_problems(LIMITS["heldout"], 0, "heldout")) == LIMITS["heldout"]
    assert len(entailment_pairs(LIMITS["heldout"], 0, "heldout")) == LIMITS["heldout"]


def test_a_negative_number_of_documents_is_refused():
    with pytest.raises(ValueError, match="-1"):
        pretraining_text(-1, 0)


# -------------------------------------------------------------------- word problems


def solve(question: str) -> list[str]:
    """The sums of a question, read from its sentences alone."""
    opening, *changes, asked = re.findall(r"[^.?]+[.?]", question)
    opening, changes = opening.strip(), [c.strip() for c in changes]
    first = re.fullmatch(r"(\w+) has (\d+) (\w+)\.", opening)
    assert first
    name, have, thing = first.group(1), int(first.group(2)), first.group(3)
    assert asked.strip() == f"How many {thing} does {name} have now?"
    sums = []
    for change in changes:
        number = int(re.findall(r"\d+", change)[0])
        assert f" {number} {thing}" in change
        gain, loss = (any(re.fullmatch(p.format(name=name), change) for p in ps) for ps in (GAINS, LOSSES))
        assert gain != loss
        now = have + number if gain else have - number
        sums.append(f"{have} {'+' if gain else '-'} {number} = {now}")
        have = now
    return sums


@pytest.mark.parametrize("split", SPLITS)
def test_every_worked_solution_is_the_solution_of_its_question(split):
    for row in word_problems(3000, 2, split):
        worked, _, final = row["answer"].partition(" #### ")
        assert worked.split(", ") == solve(row["question"])
        assert final == worked.rpartition("= ")[2]
        assert final_answer(row["answer"]) == final
        assert 0 < int(final) <= 20


def test_the_commonest_answer_is_no_way_to_pass():
    rows = word_problems(4000, 0, "heldout")
    commonest = Counter(final_answer(row["answer"]) for row in rows).most_common(1)[0][1]
    assert commonest / len(rows) < 0.12


# -------------------------------------------------------------------- entailment


def holds(row: Row) -> bool:
    """Whether sentence1 makes sentence2 true."""
    told = re.fullmatch(r"(\w+) has (\d+) (\w+) from (\w+)\.", row["sentence1"])
    claim = re.fullmatch(r"(\w+) has more than (\d+) (\w+)\.", row["sentence2"])
    assert told
    assert claim
    assert (told.group(1), told.group(3)) == (claim.group(1), claim.group(3))
    assert told.group(1) != told.group(4)
    return int(told.group(2)) > int(claim.group(2))


@pytest.mark.parametrize("split", SPLITS)
def test_every_label_is_what_the_sentences_say(split):
    for row in entailment_pairs(3000, 5, split):
        assert (row["label"] == "entailment") == holds(row)


@pytest.mark.parametrize("n", [1, 2, 7, 400])
@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced(split, n):
    counts = Counter(row["label"] for row in entailment_pairs(n, 0, split))
    assert abs(counts["entailment"] - counts["not_entailment"]) <= 1


def test_labels_do_not_follow_the_order_of_the_rows():
    labels = [row["label"] for row in entailment_pairs(4000, 0, "train")]
    same = sum(a == b for a, b in pairwise(labels))
    assert 0.46 < same / len(labels) < 0.54


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def second_alone(row: Row) -> list[str]:
    return words(row["sentence2"])


def second_alone_in_pairs(row: Row) -> list[str]:
    found = words(row["sentence2"])
    return [f"{a} {b}" for a, b in pairwise(found)]


def first_alone(row: Row) -> list[str]:
    return words(row["sentence1"])


def both(row: Row) -> list[str]:
    return [*(f"1 {w}" for w in words(row["sentence1"])), *(f"2 {w}" for w in words(row["sentence2"]))]


@pytest.mark.parametrize(
    ("cues", "highest"), [(second_alone, 0.545), (second_alone_in_pairs, 0.545), (first_alone, 0.66), (both, 0.66)]
)
def test_word_counts_tell_little_of_the_label(cues, highest):
    """A naive Bayes classifier on 8000 rows, measured on 2000 others: the second sentence alone stays at chance (four
    standard errors are 4.5 points), and what the first alone gives (61 %) is far from what the task asks."""
    train, held_out = entailment_pairs(8000, 0, "train"), entailment_pairs(2000, 0, "heldout")
    counts = {label: Counter(c for row in train if row["label"] == label for c in cues(row)) for label in LABELS}
    known = {*counts["entailment"], *counts["not_entailment"]}

    def score(row: Row) -> float:
        return sum(
            math.log((counts["entailment"][c] + 1) / (counts["not_entailment"][c] + 1)) for c in cues(row) if c in known
        )

    right = sum((score(row) > 0) == (row["label"] == "entailment") for row in held_out)
    assert 0.455 < right / len(held_out) < highest


# -------------------------------------------------------------------- pretraining text


def test_pretraining_text_holds_nothing_of_the_task_format():
    for document in pretraining_text(20_000, 0):
        assert not re.search(r"Question|Answer|####|entailment", document)


def test_pretraining_text_holds_no_held_out_row():
    """Every story is put back as the question that it would be: none is on the held-out side."""
    stories = 0
    for document in pretraining_text(5000, 0):
        assert not re.search(r"has \d+ \w+ from", document)  # the first sentence of an entailment pair
        opening = re.match(r"(\w+) has \d+ (\w+)\.", document)
        if opening and " = " in document:
            told = re.sub(r" (\d+ [+-] \d+ = \d+\.|Now \w+ has \d+ \w+\.)", "", document)
            story = re.split(r" How many|\n| ##", told)[0]
            asked = f"How many {opening.group(2)} does {opening.group(1)} have now?"
            assert _split_of(f"{story} {asked}") == "train"
            stories += 1
    assert stories > 1500


def test_every_sum_of_the_pretraining_text_is_right():
    checked = 0
    for document in pretraining_text(3000, 0):
        for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", document):
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            checked += 1
        for a, relation, b in re.findall(r"(\d+) is (more|less) than (\d+)", document):
            assert (int(a) > int(b)) == (relation == "more")
    assert checked > 3000


def test_every_comparison_and_reply_of_the_pretraining_text_is_right():
    compared = replied = 0
    for document in pretraining_text(3000, 0):
        have = {name: (int(n), thing) for name, n, thing in re.findall(r"(\w+) has (\d+) (\w+)", document)}
        for name, relation, thing, other in re.findall(r"(\w+) has (more|fewer) (\w+) than ([A-Z]\w+)", document):
            assert have[name][1] == have[other][1] == thing
            assert (have[name][0] > have[other][0]) == (relation == "more")
            compared += 1
        for name, relation, limit, thing in re.findall(r"(\w+) has (more|fewer) than (\d+) (\w+)", document):
            assert have[name][1] == thing
            assert (have[name][0] > int(limit)) == (relation == "more")
            assert have[name][0] != int(limit)
        for thing, name, number in re.findall(r"How many (\w+) does (\w+) have\? (\d+)\.", document):
            assert have[name] == (int(number), thing)
            replied += 1
        for name, number, thing in re.findall(r"What does (\w+) have\? (\d+) (\w+)\.", document):
            assert have[name] == (int(number), thing)
        for thing, name in re.findall(r"Who has (\w+)\? (\w+)\.", document):
            assert have[name][1] == thing
    assert compared > 300
    assert replied > 300


def test_the_tasks_use_no_word_that_the_pretraining_text_lacks():
    text = {w for document in pretraining_text(5000, 0) for w in words(document)}
    rows = [*word_problems(1000, 0, "heldout"), *entailment_pairs(1000, 0, "heldout")]
    assert {w for row in rows for k, v in row.items() if k != "label" for w in words(v)} <= text
    assert {*NAMES, *THINGS} <= text


# -------------------------------------------------------------------- the script that makes the model


def test_pretraining_twice_gives_the_same_files(tmp_path):
    small = "--documents 200 --steps 4 --batch 2 --hidden 16 --intermediate 32 --layers 1 --heads 2 --kv-heads 1"
    for name in ("one", "two"):
        pretrain(parse(["--out", str(tmp_path / name), *small.split()]), Console(quiet=True))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert "--documents 200" in card
    assert "--kv-heads 1" in card


def test_packed_documents_are_whole_and_do_not_see_each_other():
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    texts = pretraining_text(40, 0)
    ids, targets, positions = packed(texts, tokenizer, 128)
    assert positions[0, 0] == 0
    starts = (ids == tokenizer.bos_token_id).nonzero().tolist()
    assert len(starts) == len(texts)
    for (row, start), text in zip(starts, texts, strict=True):
        document = tokenizer(f"{text}</s>")["input_ids"]
        part = slice(start, start + len(document))
        assert ids[row, part].tolist() == document
        assert targets[row, part].tolist() == [-100, *document[1:]]
        assert positions[row, part].tolist() == list(range(len(document)))
    # A document's logits in the middle of a row are those that it has alone.
    model = AutoModelForCausalLM.from_pretrained(ASSET).eval()
    row, start = next(place for place in starts if place[1] > 0)
    document = tokenizer(f"{texts[starts.index([row, start])]}</s>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        among = model(input_ids=ids, position_ids=positions, use_cache=False).logits[row]
        alone = model(input_ids=document).logits[0]
    torch.testing.assert_close(among[start : start + document.shape[1]], alone, rtol=1e-4, atol=1e-4)


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a row 8"):
        packed(["Ada has 3 nuts. " * 9], AutoTokenizer.from_pretrained(ASSET), 8)


# -------------------------------------------------------------------- the shipped model


def test_the_shipped_model_is_small_and_holds_no_pickle():
    names = {path.name for path in ASSET.iterdir()}
    assert sum(path.stat().st_size for path in ASSET.rglob("*") if path.is_file()) < 8 * 2**20
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [n for n in names if not n.endswith((".json", ".md", ".safetensors"))]


def test_the_shipped_model_is_a_llama_with_grouped_query_attention():
    config = json.loads((ASSET / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert 0 < config["num_key_value_heads"] < config["num_attention_heads"]
    model = AutoModelForCausalLM.from_pretrained(ASSET)
    layer = model.model.layers[0].self_attn
    assert layer.k_proj.out_features < layer.q_proj.out_features


def test_the_card_states_licence_figures_and_command():
    card = (ASSET / "README.md").read_text(encoding="utf-8")
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(ASSET).parameters())
    assert "license: apache-2.0" in card
    assert "python -m pipelines.pretrain" in card
    assert f"{parameters:,}" in card


def test_the_tokenizer_gives_every_digit_a_token_and_loses_nothing():
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    ids = tokenizer(" 14 + 307 = 321", add_special_tokens=False)["input_ids"]
    assert [t.replace("Ġ", "") for t in tokenizer.convert_ids_to_tokens(ids)] == [*"14+307=321"]
    for text in ("Question: Eva has 14 nuts.\nAnswer: 9 - 2 = 7 #### 7", "naïve 漢字 🙂 \t x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.encode("Eva</s>")[0] == tokenizer.bos_token_id
    assert tokenizer.encode("Eva</s>")[-1] == tokenizer.eos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_the_tokenizer_keeps_the_sentences_of_a_pair_apart():
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    pair = tokenizer("Eva has 5 nuts.", "Eva has nuts.")["input_ids"]
    assert pair == tokenizer("Eva has 5 nuts.\nEva has nuts.")["input_ids"]


@torch.no_grad()
def test_the_shipped_model_knows_its_sums():
    tokenizer, model = AutoTokenizer.from_pretrained(ASSET), AutoModelForCausalLM.from_pretrained(ASSET).eval()
    right = 0
    sums = [(a, b) for a in range(2, 11) for b in range(2, 10)]
    for a, b in sums:
        story = f"Eva has {a} nuts. Eva finds {b} nuts. {a} + {b} ="
        ids = tokenizer(story, return_tensors="pt")["input_ids"]
        text = tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :])
        right += re.match(r" (\d+)", text) is not None and int(text.split(".")[0]) == a + b
    assert right / len(sums) > 0.95
