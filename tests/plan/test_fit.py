"""What fits where, the longest context, and the smallest change that would do."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.config import BEHEMOTH_ASSUMED, SCOUT, VISION
from herd.errors import ConfigError
from herd.plan.advice import changes, devices_needed
from herd.plan.fit import Plan, Setup
from herd.plan.machines import machine
from herd.plan.memory import parse_kv
from herd.plan.weights import parse_weights
from tests.model.tiny_models import tiny

M = 1024**2
LONG = tiny(head_dim=64, max_position_embeddings=100 * M)


def scout(gpu: str = "h100-80g", weights: str = "int4", kv: str = "int4", **fields: Any) -> Plan:
    fields = {"cfg": SCOUT, "vision": VISION, "count": 1, "context": M, **fields}
    return Plan(Setup("scout", machine=machine(gpu), weights=parse_weights(weights), kv=parse_kv(kv), **fields))


def test_scout_in_int4_on_one_gpu_has_room_for_a_million_tokens_and_not_for_ten() -> None:
    assert scout().fits and not scout(context=10 * M).fits
    assert scout().longest == scout(context=10 * M).longest
    assert not scout(weights="bf16").fits and scout(weights="bf16").longest == 0


def test_what_is_needed_is_the_sum_of_the_items() -> None:
    plan = scout(kv_in="host", experts_in="disk")
    for place in ("device", "host", "disk"):
        assert plan.bytes_in(place) == sum(item.nbytes for item in plan.items if item.place == place) > 0
    assert sum(item.parameters for item in plan.items) == 108_641_793_536
    assert [item.name for item in plan.items if item.place == "disk"] == ["routed experts"]


def test_hosts_hold_what_all_their_devices_have_there() -> None:
    one, eight, more = (scout(kv_in="host", count=n).bytes_in("host") for n in (1, 8, 16))
    assert one == eight == more  # a host has eight devices, one for each key/value head


@settings(max_examples=25, deadline=None)
@given(st.integers(70, 400), st.sampled_from(["bf16", "int8", "int4"]))
def test_the_longest_context_fits_and_one_token_more_does_not(gigabytes: int, kv: str) -> None:
    plan = scout(kv=kv)
    plan = Plan(replace(plan.setup, machine=replace(plan.setup.machine, memory=gigabytes * 1e9)))
    longest = plan.longest
    assert longest == 0 or plan.at(longest).fits
    assert longest == SCOUT.max_position_embeddings or not plan.at(longest + 1).fits


@pytest.mark.parametrize(
    "plan",
    [
        scout(context=10 * M),
        scout(weights="bf16", kv="bf16"),
        scout(weights="bf16", gpu="mac-m4-max"),
        scout(gpu="laptop", weights="int8", kv="bf16", cfg=LONG, context=100 * M),
        scout(gpu="cpu", weights="bf16", kv="bf16", context=128 * 1024),
        scout(cfg=BEHEMOTH_ASSUMED, vision=None, weights="fp8", kv="fp8", gpu="b200"),
    ],
    ids=["10M", "bf16", "mac", "laptop", "cpu", "behemoth"],
)
def test_every_change_is_enough_and_nothing_less_is(plan: Plan) -> None:
    assert changes(plan)
    for change in changes(plan):
        after = Plan(change.applied(plan.setup))
        assert after.fits, change.text
        for left_out in change.fields:
            fewer = replace(plan.setup, **{k: v for k, v in change.fields if k != left_out[0]})
            assert not _fits(fewer), f"{change.text} without {left_out[0]}"


def _fits(setup: Setup) -> bool:
    try:
        return Plan(setup).fits
    except ConfigError:  # on disk are only contexts, which are not bf16
        return False


def test_changes_of_one_thing_come_in_their_order() -> None:
    assert [change.text for change in changes(scout(context=10 * M))] == [
        "keys and values of global layers in host memory",
        "4 devices",
        "keys and values of global layers on disk",
        f"a context of {scout().longest:,} tokens",
    ]
    [first, *_] = changes(scout(kv="bf16", context=2 * M // 3))
    assert first.text == "keys and values int8"  # 8 bits are enough; fp8 is as wide but for the scales
    assert changes(scout()) == []


def test_two_things_are_changed_where_one_is_not_enough() -> None:
    plan = scout(gpu="mac-m4-max", weights="bf16", kv="bf16")
    texts = [change.text for change in changes(plan)]
    assert texts[0] == "routed experts on disk"
    assert "keys and values int8 and weights int4_mixed" in texts


def test_there_may_be_no_change_that_does() -> None:
    assert changes(scout(gpu="cpu", cfg=BEHEMOTH_ASSUMED, weights="bf16", kv="bf16")) == []


def test_a_machine_is_offered_only_what_it_has() -> None:
    plan = scout(gpu="mac-m4-max", weights="bf16", kv="bf16", context=10 * M)
    texts = " ".join(change.text for change in changes(plan))
    assert texts
    assert "fp8" not in texts and "host" not in texts and "devices" not in texts


def test_devices_needed_is_the_least_number() -> None:
    assert devices_needed(scout(context=10 * M)) == 4
    assert devices_needed(scout()) == 1
    behemoth = scout(cfg=BEHEMOTH_ASSUMED, vision=None, weights="bf16", kv="bf16")
    count = devices_needed(behemoth)
    assert count is not None and count % 8 == 0
    assert Plan(replace(behemoth.setup, count=count)).fits and not Plan(replace(behemoth.setup, count=count - 8)).fits
    assert devices_needed(scout(gpu="mac-m4-max", weights="bf16")) is None


def test_herds_engine_runs_more_than_memory_holds_with_experts_on_disk() -> None:
    plan = scout(gpu="cpu", context=128 * 1024)
    assert not plan.fits and [change.text for change in changes(plan)] == ["routed experts on disk"]
    after = Plan(replace(plan.setup, experts_in="disk"))
    assert after.fits
    # All but one expert has gone to disk, where the checkpoint is not needed.
    [experts] = [item.nbytes for item in after.items if item.name == "routed experts, in a packed folder"]
    assert plan.bytes_in("device") - after.bytes_in("device") == experts - experts // (48 * 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 2}, "cpu has no connection"),
        ({"experts_in": "host"}, "cpu has no host"),
        ({"kv": "fp8"}, "as int8 or int4"),
        ({"kv": "bf16", "kv_in": "disk"}, "as int8 or int4"),
        ({"weights": "int4_mixed"}, "experts=int4:128,shared=int4:128"),
        ({"cfg": tiny()}, "64, 128, 192 or 256 dimensions, not 8"),
    ],
)
def test_what_herds_engine_does_not_do_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assert not scout(gpu="cpu", **fields).items
