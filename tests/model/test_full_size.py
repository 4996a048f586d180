"""Scout, Maverick and the assumed Behemoth at full size, without storage: parameters, shapes, types and FLOPs.

The fake tensors have shapes, types and devices, but no values. What the model asks of values, the tests tell it: where
the tokens of a sequence stand. The builds of PyTorch for machines without CUDA cannot index a tensor on it, not even a
fake one; here the operations do so that indexing stands for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from herd.checkpoint.load import empty_transformer, empty_vision
from herd.config import PRESETS, VISION, TextConfig
from herd.model import KVCache, Transformer, attention
from herd.model.cache import KVRow, KVRows
from herd.model.fusion import Patches
from herd.model.vision import Vision
from herd.plan.flops import flops_per_tile, flops_per_token
from tests.model.flops import flop_counter

# Spec §1.4 and, assumed, §1.5.
TEXT = {"scout": 107_769_861_120, "maverick": 400_711_848_960, "behemoth-assumed": 1_991_729_233_920}
ACTIVE = {"scout": 17_172_894_720, "maverick": 17_184_691_200, "behemoth-assumed": 288_506_265_600}
WITH_IMAGES = {"scout": 108_641_793_536, "maverick": 401_583_781_376}
PATCHES = VISION.tokens_per_tile  # of an image of one tile, among other tokens
PROMPT = 200


_WITHOUT_GUARD = {Tensor.__invert__: torch.bitwise_not, Tensor.contiguous: torch.ops.aten.contiguous.default}


class _Indexing(TorchFunctionMode):
    """Indexing by numbers, slices, None, ... and a tensor, as the operations that it stands for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return self._get(*args)
        if func is Tensor.__setitem__:
            x, key, value = args
            value.expand(self._get(x, key).shape)  # which fails if it does not fit; there is nothing to copy
            return None
        func = _WITHOUT_GUARD.get(func, func)
        return func(*args, **(kwargs or {}))

    def _get(self, x: Tensor, key: Any) -> Tensor:
        keys, dim = list(key if isinstance(key, tuple) else (key,)), 0
        if ... in keys:
            place = keys.index(...)
            keys[place : place + 1] = [slice(None)] * (x.ndim - sum(k is not None for k in keys) + 1)
        for one in keys:
            if one is None:
                x, dim = x.unsqueeze(dim), dim + 1
            elif isinstance(one, Tensor):
                x, dim = x.index_select(dim, one), dim + 1
            elif isinstance(one, slice):
                x, dim = torch.ops.aten.slice.Tensor(x, dim, one.start, one.stop, one.step or 1), dim + 1
            else:
                x = x.select(dim, one)
        return x


class _Rows(KVRows):
    """One sequence, whose next token stands at a position that is told, not read from a tensor."""

    def __init__(self, row: KVRow, start: int) -> None:
        super().__init__([row])
        self.start = start

    def _find_spans(self, positions_BT: Tensor) -> list[tuple[slice, int]]:
        return [(slice(0, positions_BT.shape[1]), self.start)]


@contextmanager
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HERD_KERNELS", "reference")
    monkeypatch.setattr(attention, "_tables", {})  # or later tests would find fake tables
    with torch.inference_mode(), FakeTensorMode(), _Indexing():
        yield


def placed(module: nn.Module, device: str) -> Any:
    """The module with fake weights in bfloat16."""
    for name, parameter in list(module.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        setattr(module.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
    return module.eval()


def check(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    assert (tuple(x.shape), x.dtype, x.device.type) == (shape, dtype, device)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters(name: str) -> None:
    model, vision = (sum(p.numel() for p in part.parameters()) for part in empty(PRESETS[name]))
    cfg = PRESETS[name]
    assert model == cfg.num_parameters() == TEXT[name]
    assert cfg.num_parameters(active=True) == ACTIVE[name]
    assert vision == VISION.num_parameters(cfg.hidden_size)
    assert model + vision == WITH_IMAGES.get(name, model + vision)


def empty(cfg: TextConfig) -> tuple[Transformer, Vision]:
    return empty_transformer(cfg), empty_vision(VISION, cfg.hidden_size)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PRESETS)
def test_an_image_a_prompt_and_a_token(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types are right at every step, and FLOPs those of the formulas."""
    cfg, (model, vision) = PRESETS[name], empty(PRESETS[name])
    V, D = cfg.vocab_size, cfg.hidden_size
    with fake(monkeypatch):
        model, vision = placed(model, device), placed(vision, device)
        row = KVCache(cfg, model.memory_dtype).open(PROMPT + 1)
        with flop_counter() as counter:
            features = vision.features(torch.empty(1, 3, 336, 336, device=device))
        check(features, (PATCHES, D), torch.bfloat16, device)
        assert counter.get_total_flops() == flops_per_tile(VISION, D)

        ids, positions = (torch.empty(1, PROMPT, dtype=torch.long, device=device) for _ in range(2))
        at = torch.empty(PATCHES, dtype=torch.long, device=device)
        with flop_counter() as counter:
            states = model.states(ids, positions, _Rows(row, 0), Patches(at, features))
            logits = model.logits(states[:, -1])
        check(states, (1, PROMPT, D), torch.bfloat16, device)
        check(logits, (1, V), torch.float32, device)
        assert counter.get_total_flops() == prompt_flops(cfg)

        with flop_counter() as counter:
            logits = model(ids[:, :1], positions[:, :1], _Rows(row, PROMPT))
        check(logits, (1, 1, V), torch.float32, device)
        assert counter.get_total_flops() == flops_per_token(cfg, PROMPT + 1).total
        for kept in row.remembered(cfg.num_hidden_layers - 1):
            check(kept, (PROMPT + 1, cfg.num_key_value_heads, cfg.head_dim), torch.bfloat16, device)


def prompt_flops(cfg: TextConfig) -> int:
    """Those of the prompt, with the logits of its last token. All queries are compared with all keys, also those that
    causality then hides."""
    first, head = flops_per_token(cfg, 1, head=False), flops_per_token(cfg, 1).head
    return PROMPT * (first.total - first.attention) + PROMPT**2 * first.attention + head
