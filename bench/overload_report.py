"""What `bench.overload` found, summed up and judged."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FILL_S = 30  # until queues and caches are full


@dataclass
class Reply:
    """What came of one request. Seconds from first sending, waiting after refusals included."""

    client: str
    outcome: str
    refused: int
    tokens: int
    first_s: float | None
    whole_s: float


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values) or [float("nan")]

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)

    return {"count": len(values), "p50": at(0.5), "p95": at(0.95), "most": at(1.0)}


def kind(replies: Sequence[Reply], name: str) -> dict[str, Any]:
    """What came of the requests of the clients of one kind."""
    mine = [reply for reply in replies if reply.client.startswith(name)]
    outcomes = Counter(reply.outcome for reply in mine)
    return {
        "outcomes": dict(outcomes.most_common(12)),
        "refused_429": sum(reply.refused for reply in mine),
        "first_token_s": quantiles([reply.first_s for reply in mine if reply.first_s]),
        "whole_s": quantiles([reply.whole_s for reply in mine if reply.outcome == "whole"]),
    }


def fairness(replies: Sequence[Reply], clients: int) -> dict[str, float]:
    """Of the tokens that each heavy client got; Jain's index is 1 where all got the same, 1/n where one got all."""
    got = Counter({f"heavy-{number}": 0 for number in range(clients)})
    for reply in replies:
        if reply.client in got:
            got[reply.client] += reply.tokens
    values = list(got.values())
    squares = sum(value * value for value in values)
    jain = sum(values) ** 2 / (len(values) * squares) if squares else 0.0
    return {"jain": round(jain, 4), "least": min(values), "median": statistics.median(values), "most": max(values)}


def growth(memory: Sequence[tuple[float, int]], minutes: float) -> dict[str, float]:
    """Of the first and the last fifth of the run, when it is full."""
    span = (60 * minutes - FILL_S) / 5
    first = [size for at, size in memory if FILL_S <= at < FILL_S + span]
    last = [size for at, size in memory if at >= 60 * minutes - span]
    if not first or not last:
        return {}
    before, after = statistics.median(first), statistics.median(last)
    return {
        "first_mb": round(before / 1e6, 1),
        "last_mb": round(after / 1e6, 1),
        "growth": round(after / before - 1, 4),
        "most_mb": round(max(size for _, size in memory) / 1e6, 1),
    }


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """What is asked for, and whether it holds."""
    alone, light = found["alone_first_token_s"]["p95"], found["light"]["first_token_s"]["p95"]
    beside = found["beside_read_first_token_s"]["p95"]
    rows: dict[str, tuple[Any, bool]] = {
        "no crash": (found["crashes"], found["crashes"] == 0),
        "no lost reply": (found["lost_replies"], not found["lost_replies"] and not found["failures_of_clients"]),
        "every refusal says when to ask again": (
            found["refusals_without_retry_after"],
            found["refusals_without_retry_after"] == 0,
        ),
        "memory grows by at most 5 %": (found["memory"].get("growth"), found["memory"].get("growth", 0.0) <= 0.05),
        "first token of short requests, p95, beside a read: at most 5 times alone": (
            round(beside / alone, 2),
            beside <= 5 * alone,
        ),
        "first token of short requests, p95, in the overload: at most 5 times alone": (
            round(light / alone, 2),
            light <= 5 * alone,
        ),
    }
    return {what: {"measured": value, "holds": bool(holds)} for what, (value, holds) in rows.items()}
