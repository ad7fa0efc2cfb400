"""Make the small base model that ships with the package: ``python -m pipelines.pretrain --out DIR``.

A Llama with grouped-query attention, pretrained from nothing on text that the project generates. The defaults are the
recipe of ``hyperlora/assets/storylm``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hyperlora.tasks.generated import pretraining_text

PAD, BEGIN, END = "<pad>", "<s>", "</s>"
IGNORED = -100
#: Its words become tokens, so that prompts are short; the text that the model learns from does not have them.
PROMPT = "Question:\nAnswer:"
LONGEST = 512


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is one token, so that sums line up.

    A text begins with ``<s>``; the two texts of a pair are two lines, as claims about a scene are in pretraining.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    line = tokenizer.encode("\n")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {line.tokens[0]} $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN)), (line.tokens[0], line.ids[0])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=LONGEST,
        padding_side="right",
    )


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        initializer_range=args.init,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def packed(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole documents side by side in rows of ``length`` tokens: ids, targets and positions, (rows, length) each.

    Positions start again with every document, which is how the model knows that no document sees another.

    Raises:
        ValueError: a document is longer than a row.
    """
    rows: list[list[list[int]]] = []
    free = 0
    for document in tokenizer([f"{text}{END}" for text in texts])["input_ids"]:
        if len(document) > length:
            raise ValueError(f"a document has {len(document)} tokens, a row {length}")
        if len(document) > free:
            rows.append([])
            free = length
        rows[-1].append(document)
        free -= len(document)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    targets = torch.full((len(rows), length), IGNORED)
    positions = torch.arange(length).repeat(len(rows), 1)
    for n, row in enumerate(rows):
        start = 0
        for document in row:
            part = slice(start, start + len(document))
            ids[n, part] = torch.tensor(document)
            targets[n, start + 1 : part.stop] = ids[n, start + 1 : part.stop]  # nothing foretells the first token
            positions[n, part] = torch.arange(len(document))
            start = part.stop
        positions[n, start:] = torch.arange(length - start)
    return ids, targets, positions


def pretrain(args: argparse.Namespace, console: Console) -> None:
    torch.set_num_threads(args.threads)
    texts = pretraining_text(args.documents, args.seed)
    tokenizer = build_tokenizer([*texts[:50_000], *[PROMPT] * 100], args.vocabulary)
    ids, targets, positions = packed(texts, tokenizer, args.length)
    model = build_model(args, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = int((ids != tokenizer.pad_token_id).sum())
    console.print(f"{parameters:,} parameters, {len(tokenizer)} tokens in the vocabulary, {tokens:,} tokens of text")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = args.steps // 20
    scheduler = LambdaLR(
        optimizer,
        lambda s: (
            (s + 1) / warmup if s < warmup else 0.5 * (1 + math.cos(math.pi * (s - warmup) / (args.steps - warmup)))
        ),
    )
    order = torch.Generator().manual_seed(args.seed)
    started, losses = time.monotonic(), []
    for step in range(args.steps):
        chosen = torch.randint(len(ids), (args.batch,), generator=order)
        # With a cache, transformers would take the row for one document in spite of its positions.
        loss = model(
            input_ids=ids[chosen], position_ids=positions[chosen], labels=targets[chosen], use_cache=False
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % max(1, args.steps // 40) == 0:
            recent = sum(losses[-50:]) / len(losses[-50:])
            left = (time.monotonic() - started) / (step + 1) * (args.steps - step - 1)
            console.print(f"step {step + 1}/{args.steps}  loss {recent:.4f}  {left:.0f} s left", highlight=False)
    out = Path(args.out)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card(args, model, tokenizer), encoding="utf-8")
    console.print(f"wrote {out}")


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Figures on 500 documents of another seed, each read once and not generated.

    Returns:
        ``loss`` in nats per token, and the shares of tokens foretold rightly: ``result`` (digits after ``=``), ``sign``
        (of a sum in a story), and ``comparison`` (``more`` or ``fewer``).
    """
    model.eval()
    right = {"result": 0, "sign": 0, "comparison": 0}
    count = dict.fromkeys(right, 0)
    loss, tokens = 0.0, 0
    for text in pretraining_text(500, seed + 1):
        ids = tokenizer(f"{text}{END}", return_tensors="pt")["input_ids"]
        logits, targets = model(input_ids=ids).logits[0, :-1], ids[0, 1:]
        loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        tokens += len(targets)
        foretold = logits.argmax(-1).tolist()
        after_equals = False
        for guess, target in zip(foretold, targets.tolist(), strict=True):
            word = tokenizer.decode([target]).strip()
            after_equals = word == "=" or (after_equals and word.isdigit())
            kind = None
            if after_equals and word != "=":
                kind = "result"
            elif word in ("+", "-") and " has " in text:
                kind = "sign"
            elif word in ("more", "fewer"):
                kind = "comparison"
            if kind:
                right[kind] += guess == target
                count[kind] += 1
    return {"loss": loss / tokens} | {kind: right[kind] / max(1, count[kind]) for kind in right}


def card(args: argparse.Namespace, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    defaults = parse(["--out", args.out])
    changed = [f" --{k.replace('_', '-')} {v}" for k, v in vars(args).items() if v != getattr(defaults, k)]
    figures = measure(model, tokenizer, args.seed)
    return f"""---
license: apache-2.0
library_name: transformers
---
# storylm

A Llama of {sum(p.numel() for p in model.parameters()):,} parameters: {args.layers} layers, hidden size {args.hidden},
{args.heads} attention heads on {args.kv_heads} key-value heads, and a byte-level BPE of {len(tokenizer)} tokens. It was
pretrained from nothing on {args.documents:,} documents that `hyperlora.tasks.generated.pretraining_text` makes from
seed {args.seed}: stories with sums, replies and comparisons. No text of people is in it. It is a base for the
quickstart's fine-tuning and of no other use: it knows the words and the sums of the tasks, but neither their questions
nor their answer format.

| on 500 documents of seed {args.seed + 1} | |
|---|---|
| loss | {figures["loss"]:.3f} nats per token |
| digits of the results of sums | {figures["result"]:.1%} right |
| signs of sums in stories | {figures["sign"]:.1%} right |
| `more` or `fewer` | {figures["comparison"]:.1%} right |

Made by `python -m pipelines.pretrain --out DIR{"".join(changed)}`: {args.steps:,} steps of {args.batch} x {args.length}
tokens, AdamW at {args.lr}, cosine decay, one seed for text, weights and order.

Licence: Apache-2.0.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=80_000)
    parser.add_argument("--vocabulary", type=int, default=1024, help="most tokens of the BPE")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=352)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a packed row")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--init", type=float, default=0.08, help="standard deviation of the first weights")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main() -> None:
    pretrain(parse(), Console())


if __name__ == "__main__":
    main()
