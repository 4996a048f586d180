"""Times follow from rates: by hand, and against a published run."""

from dataclasses import replace
from typing import Any

import pytest

from herd.config import SCOUT
from herd.plan.fit import Plan, Setup
from herd.plan.flops import flops_of_prompt, flops_of_reading, flops_per_token
from herd.plan.machines import Machine, machine
from herd.plan.memory import parse_kv
from herd.plan.times import decode, prefill
from herd.plan.weights import parse_weights

M, GiB = 1024**2, 1024**3
ONE = Machine(
    "one",
    "one",
    memory=1e12,
    bandwidth=1e12,
    bf16=1e15,
    fp8=2e15,
    link=5e10,
    host_memory=1e12,
    interconnect=4e11,
    devices=8,
)


def scout(weights: str = "bf16", kv: str = "bf16", machine: Machine = ONE, **fields: Any) -> Plan:
    fields = {"count": 1, "context": M, **fields}
    setup = Setup("scout", SCOUT, None, machine, weights=parse_weights(weights), kv=parse_kv(kv), **fields)
    return Plan(setup)


def test_reading_is_bound_by_arithmetic() -> None:
    time = prefill(scout())
    assert time.bound_by == "compute"
    assert time.seconds == pytest.approx(flops_of_prompt(SCOUT, M).total / 1e15)


def test_answering_is_bound_by_what_a_token_reads() -> None:
    time = decode(scout())
    read = 2 * (SCOUT.num_parameters(active=True) - SCOUT.vocab_size * SCOUT.hidden_size)
    read += 48 * GiB + (9 * GiB) // 8
    assert time.bound_by == "memory"
    assert time.seconds == pytest.approx(read / 1e12)
    assert time.compute == pytest.approx(flops_per_token(SCOUT, M).total / 1e15)


def test_fp8_counts_where_weights_are_fp8_and_int4_does_not() -> None:
    flops = flops_of_prompt(SCOUT, M)
    eight = flops.projections + flops.routed_experts + flops.shared_experts + flops.head
    assert prefill(scout("fp8")).compute == pytest.approx(eight / 2e15 + (flops.attention + flops.router) / 1e15)
    assert prefill(scout("int4")).compute == prefill(scout()).compute


def test_several_devices_share_the_work_and_talk() -> None:
    one, eight = scout(), scout(count=8)
    assert prefill(eight).compute == pytest.approx(prefill(one).compute / 8)
    assert prefill(one).waiting == 0
    sent = M * 48 * 2 * 5120 * 2 * 2 * 7 / 8  # twice a layer, bf16, there and back in a ring
    assert prefill(eight).waiting == pytest.approx(sent / 4e11)
    assert decode(eight).seconds < decode(one).seconds


def test_what_is_in_host_memory_comes_over_the_link() -> None:
    assert decode(scout(kv_in="host")).moving == pytest.approx(48 * GiB / 5e10)
    steps = M // 8192
    past = 8192 * steps * (steps - 1) // 2 + M
    assert prefill(scout(kv_in="host")).moving == pytest.approx(past * 49_152 / 5e10)
    experts = 2 * 48 * 16 * 3 * 5120 * 8192
    assert prefill(scout(experts_in="host")).moving == pytest.approx(steps * experts / 5e10)
    assert decode(scout(experts_in="host")).waiting == pytest.approx(experts / 16 / 5e10)


def test_herds_engine_reads_into_a_context_up_to_the_last_global_layer() -> None:
    one_global = replace(SCOUT, num_hidden_layers=7, interleave_moe_layer_step=1)
    cpu = machine("cpu")
    setup = replace(scout("int8", "int8", cpu).setup, cfg=one_global)
    flops = flops_of_reading(one_global, M)
    whole = flops.total - flops.attention - flops.router
    expected = whole / cpu.int8 + (flops.attention + flops.router) / cpu.bf16
    assert prefill(Plan(setup)).compute == pytest.approx(expected / cpu.compute_share)


def test_a_published_run_took_about_what_is_expected() -> None:
    """Scout on 8 H200, vLLM 0.12, keys and values in fp8: 9.81M tokens in 2,964 s."""
    time = prefill(scout("bf16", "fp8", machine("h200"), count=8, context=9_810_000))
    assert time.bound_by == "compute" and time.seconds == pytest.approx(2964, rel=0.1)
