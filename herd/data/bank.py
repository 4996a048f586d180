"""Hidden states of frozen layers, computed once and kept on disk, so that training never runs those layers again."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from herd.model import Transformer

_BATCH_TOKENS = 4096
_SAVE_EVERY = 16  # batches


def hidden_states(
    transformer: Transformer,
    depth: int,
    ids_N: np.ndarray,
    start: np.ndarray,
    path: Path,
    progress: Callable[[int], None],
) -> Tensor:
    """States [N, D] bfloat16 below layer `depth`, memory-mapped from `path`; row i of the text is start[i]:start[i+1].

    Rows start on a chunk boundary. An interrupted call goes on where it stopped; progress gets the tokens done.
    """
    done_file = path.with_suffix(".json")
    order = np.argsort(start[:-1] - start[1:], kind="stable")  # longest first: rows of a batch are of like length
    batches = list(_batches(np.diff(start)[order]))
    done = json.loads(done_file.read_text())["batches"] if done_file.exists() else 0
    shape = (len(ids_N), transformer.config.hidden_size)
    states = np.memmap(path, np.int16, "r+" if path.exists() else "w+", shape=shape)
    for i, (begin, end) in enumerate(batches):
        rows = order[begin:end]
        if i >= done:
            _fill(transformer, depth, ids_N, start, rows, states)
        progress(int((start[rows + 1] - start[rows]).sum()))
        if (i + 1) % _SAVE_EVERY == 0 or i + 1 == len(batches):
            states.flush()
            temporary = done_file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"batches": max(done, i + 1)}))
            temporary.replace(done_file)
    return torch.from_numpy(states).view(torch.bfloat16)


def _batches(lengths: np.ndarray) -> list[tuple[int, int]]:
    spans, begin = [], 0
    while begin < len(lengths):
        end = begin + max(1, _BATCH_TOKENS // int(lengths[begin]))
        spans.append((begin, min(end, len(lengths))))
        begin = end
    return spans


@torch.inference_mode()
def _fill(
    transformer: Transformer, depth: int, ids_N: np.ndarray, start: np.ndarray, rows: np.ndarray, states: np.ndarray
) -> None:
    ids_BT = pad([torch.from_numpy(ids_N[start[r] : start[r + 1]].astype(np.int64)) for r in rows])
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    x_BTD = transformer.model.embed_tokens(ids_BT)
    for block in transformer.blocks[:depth]:
        x_BTD = block(x_BTD, positions_BT, None)
    for x_TD, r in zip(x_BTD.bfloat16(), rows, strict=True):
        states[start[r] : start[r + 1]] = x_TD[: start[r + 1] - start[r]].view(torch.int16).numpy()


def pad(rows: list[Tensor], value: int = 0) -> Tensor:
    """Stack rows of unequal length, filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
