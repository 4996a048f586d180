"""What Herd's own engine allocates: the same numbers from a plan and from what is there."""

import pytest
import torch

from herd import engine, kernels
from herd.config import TextConfig
from herd.formats import parse
from herd.kernels import layers, native
from herd.kernels.native import PackedWeight
from herd.model import KVCache, Transformer
from herd.model.cache import bytes_needed
from herd.model.quantized import quantize
from herd.plan import process as planned
from herd.plan.process import process
from tests.model.tiny_models import tiny

BASE = {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS = {
    "experts": tiny(**BASE),
    "dense": tiny(**BASE, num_local_experts=0),
    "both": tiny(**BASE, interleave_moe_layer_step=2, num_experts_per_tok=2),
    "uneven": tiny(**BASE, intermediate_size=40, vocab_size=101),
}


def test_constants_are_those_of_the_engine() -> None:
    assert engine.engine.PROMPT_TOKENS == planned.PROMPT_TOKENS
    assert native.PANEL == planned.PANEL
    assert layers._GATES == planned.GATES


@pytest.mark.skipif(not kernels.runs_layers(torch.empty(0), 64), reason="layers are packed by the native library")
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4:32", "experts=int4,attention=int8:16", "fp8"])
@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
def test_packed_weights_take_what_is_planned(cfg: TextConfig, weights: str) -> None:
    model = Transformer(cfg).to(torch.bfloat16)
    quantize(model, parse(weights))
    assert model.packed is not None
    found = [model.packed.head]
    norms = model.packed.norm_D.nbytes
    for layer in model.packed.layers:
        found += [layer.qkv, layer.out]
        found += [weight for mlp in (layer.shared, *layer.experts) for weight in (mlp.gate_up, mlp.down)]
        norms += layer.attention_norm_D.nbytes + layer.mlp_norm_D.nbytes
        norms += 0 if layer.router_ED is None else layer.router_ED.nbytes
    assert all(isinstance(weight, PackedWeight) for weight in found)
    need = process(cfg, parse(weights), 16)
    assert sum(-(-weight.packed.nbytes // 64) * 64 for weight in found) == need.weights
    assert sum(weight.scale.nbytes for weight in found) == need.scales
    assert norms == need.norms_and_routers
    experts = [mlp for layer in model.packed.layers for mlp in layer.experts]
    assert sum(weight.nbytes for mlp in experts for weight in (mlp.gate_up, mlp.down)) == need.experts


@pytest.mark.parametrize("context", [1, 8, 33, 100])
def test_keys_and_values_take_what_is_planned(context: int) -> None:
    cfg = MODELS["experts"]
    row = KVCache(cfg, torch.bfloat16).open(context)
    there = sum(row.packed(layer).nbytes for layer in range(cfg.num_hidden_layers))
    assert there == row.nbytes == bytes_needed(cfg, context, torch.bfloat16)
    assert process(cfg, parse("int8"), context).kv == there


def test_the_peak_is_the_larger_of_packing_and_running() -> None:
    cfg = MODELS["experts"]
    short, long = process(cfg, parse("bf16"), 8), process(cfg, parse("bf16"), 1000)
    kept = short.weights + short.scales + short.norms_and_routers
    assert long.own == kept + long.kv + long.step + long.heap > short.own >= kept + short.packing
    assert long.peak == long.own + long.mapped and long.mapped == 2 * cfg.vocab_size * cfg.hidden_size
    assert long.step == short.step  # a step ends with an attention chunk
