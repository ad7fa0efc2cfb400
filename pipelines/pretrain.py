"""Make the small base model that ships with the package: ``python -m pipelines.pretrain --out DIR``.

A Llama with grouped-query attention, pretrained from nothing on text that the project generates. The defaults are the
recipe of ``hyperlora/assets/storylm``.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hyperlora.tasks.generated import pretraining_text

PAD, END = "<pad>", "</s>"


def build_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is one token, so that sums line up."""
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
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=512, padding_side="right"
    )


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def packed(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """All documents in one row of tokens, cut into rows of ``length``."""
    ids: list[int] = []
    for document in tokenizer([f"{text}{END}" for text in texts], add_special_tokens=False)["input_ids"]:
        ids += document
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


def pretrain(args: argparse.Namespace, console: Console) -> None:
    torch.set_num_threads(args.threads)
    texts = pretraining_text(args.documents, args.seed)
    tokenizer = build_tokenizer(texts[:20_000], args.vocabulary)
    rows = packed(texts, tokenizer, args.length)
    model = build_model(args, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters:,} parameters, {len(tokenizer)} tokens, {rows.numel():,} tokens of text")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
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
        chosen = torch.randint(len(rows), (args.batch,), generator=order)
        batch = rows[chosen]
        loss = model(input_ids=batch, labels=batch).loss
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
    recent = sum(losses[-50:]) / len(losses[-50:])
    (out / "README.md").write_text(card(args, parameters, len(tokenizer), recent), encoding="utf-8")
    console.print(f"wrote {out}")


def card(args: argparse.Namespace, parameters: int, vocabulary: int, loss: float) -> str:
    return f"""---
license: apache-2.0
library_name: transformers
---
# storylm

A Llama of {parameters:,} parameters: {args.layers} layers, hidden size {args.hidden}, {args.heads} attention heads on
{args.kv_heads} key-value heads, and a byte-level BPE of {vocabulary} tokens. It was pretrained from nothing on
{args.documents:,} documents that `hyperlora.tasks.generated.pretraining_text` makes from seed {args.seed}: stories with
sums, counts and claims. It knows the words and the sums of the quickstart tasks, but neither their questions nor their
answer format.

Made by `python -m pipelines.pretrain --out DIR` with its defaults: {args.steps:,} steps of {args.batch} x {args.length}
tokens, AdamW at {args.lr}, cosine decay. The training loss at the end was {loss:.3f} nats per token.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=150_000)
    parser.add_argument("--vocabulary", type=int, default=1024, help="most tokens of the BPE")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=352)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a packed row")
    parser.add_argument("--batch", type=int, default=16, help="rows per step")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    pretrain(parser.parse_args(), Console())


if __name__ == "__main__":
    main()
