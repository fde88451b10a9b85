"""sft.py: the worked example of its docstring, losses against TRL's SFTTrainer, NEFTune, early stopping, both ways to train."""

import math

import peft
import pytest
import safetensors.torch
import torch
import transformers
import trl
from conftest import read_metrics, run_script, write_rows

import common
import sft

CONVERSATIONS = [{"prompt": "Hi", "completion": "Yo"}, {"prompt": "2+2?", "completion": "4"}]


def arguments(*flags, data=None):
    parser = common.make_parser("doc")
    sft.add_training_flags(parser)
    parser.add_argument("--loss-on", default="answers")
    return parser.parse_args(["--output", "unused", "--eval-fraction", "0", *(["--data", data] if data else []), *map(str, flags)])


def batch_of(rows, tmp_path, *flags):
    args = arguments(*flags, data=write_rows(tmp_path / "rows.jsonl", rows))
    corpus, _ = common.load_data(args, common.tiny_tokenizer(), 320)
    corpus.order = lambda epoch: torch.arange(len(rows)).numpy()
    return next(iter(corpus.deal(corpus.rows())))


def worked_example(tmp_path) -> str:
    """The table in sft.py's docstring, from the batch that the model gets."""
    batch, tokenizer = batch_of(CONVERSATIONS, tmp_path), common.tiny_tokenizer()
    ids, positions = batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    documents = (torch.tensor(positions) == 0).cumsum(0).tolist()
    target = [i - 1 in batch["target_index"].tolist() for i in range(len(ids))]
    lines, start = ["    document  positions  target  text"], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or (documents[i], target[i]) != (documents[start], target[start]):
            place = f"{positions[start]:2} .. {positions[i - 1]:2}"
            text = tokenizer.decode(ids[start:i]).replace("\n", "\\n")
            lines.append(f"    {documents[start]:8}  {place:9}  {'yes' if target[start] else 'no':6}  {text}")
            start = i
    return "\n".join(lines) + "\n"


def test_the_worked_example_is_what_the_code_makes(tmp_path):
    assert worked_example(tmp_path) in sft.__doc__.replace("\\\\n", "\\n")
