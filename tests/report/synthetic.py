"""A run folder as launch/pretrain.py and launch/evaluate.py write it, with invented but lifelike numbers."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DOMAINS = ["encyclopedia", "python", "medicine", "law"]
TOKENS_A_STEP = 8192
NEVER = 10**9
EXPERT_PARAMETERS, TRUNK_PARAMETERS = 300_000, 2_000_000


@dataclass
class Story:
    """What happens in an invented run; every later number follows from it and from ``seed``."""

    blocks: int = 2
    experts: int = 4
    ranks: int = 2
    steps: int = 300
    """Steps that are in the log."""
    budget: int = 300
    """Steps that the run is meant to take."""
    emergences: bool = True
    freezes: bool = True
    """The experts 0, 3, ... freeze, and the first of them thaws again; needs emergences."""
    domains: list[str] = field(default_factory=lambda: list(DOMAINS))
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.interval = max(1, self.budget // 60)
        slots = range(2, 2 + self.blocks)
        self.born = {b: self._check_at(s / 20) for b, s in enumerate(slots)} if self.emergences else {}
        chosen = [(b, k) for b in range(self.blocks) for k in range(self.experts) if (b + 2 * k) % 3 == 0]
        active = self.emergences and self.freezes
        self.frozen = {who: self._check_at(0.6 + 0.02 * i) for i, who in enumerate(chosen)} if active else {}
        self.thawed = dict.fromkeys(list(self.frozen)[:1], self._check_at(0.8))

    def _check_at(self, share: float) -> int:
        return round(share * self.budget / self.interval) * self.interval

    def live(self, block: int, step: int) -> bool:
        """Whether a block's experts work during a step."""
        return self.born.get(block, NEVER) < step

    def halted(self, block: int, expert: int, step: int) -> bool:
        """Whether an expert is frozen during a step."""
        return self.frozen.get((block, expert), NEVER) < step <= self.thawed.get((block, expert), NEVER)

    def optimizer_bytes_by_rank(self, step: int) -> list[int]:
        """Bytes on every rank in a step; in the first step there are no moments yet."""
        training = 0
        for b in range(self.blocks):
            alive = sum(not self.halted(b, k, step) for k in range(self.experts))
            training += alive if self.live(b, step) else 1
        each = (4 if step == 1 else 12) * (TRUNK_PARAMETERS + training * EXPERT_PARAMETERS) // self.ranks
        return [each + 1200 * rank for rank in range(self.ranks)]


def write_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write the logs of a run.

    Args:
        folder: made if it is missing.
        changes: fields of :class:`Story`.

    Returns:
        ``metrics``, ``events``, ``ledger``, ``evaluation`` and ``facts`` as they were written.
    """
    story = Story(**changes)
    metrics, events = [], []
    for step in range(1, story.steps + 1):
        metrics.append(_step(story, step))
        if step % story.interval == 0:
            events += _check(story, step)
        if step % 100 == 0:
            events.append({"event": "save", **_at(step), "checkpoint": f"step{step}", "seconds": 0.25})
    written = {
        "metrics": metrics,
        "events": events,
        "ledger": _ledger(story, metrics[-1]["flops"]),
        "evaluation": EVALUATION,
        "facts": _facts(story),
    }
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    for name in ("metrics", "events"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written[name]))
    for name, path in (("ledger", "ledger"), ("facts", "run"), ("evaluation", "evaluation/results")):
        (folder / f"{path}.json").write_text(json.dumps(written[name]))
    return written


EVALUATION = {
    "model": "runs/invented/export",
    "tasks": {
        "copa_offline": {"acc": 0.57, "acc_stderr": 0.0498, "items": 100, "chance": 0.5},
        "piqa_offline": {
            **{"acc": 0.5567, "acc_stderr": 0.0116, "acc_norm": 0.5155, "acc_norm_stderr": 0.0117},
            **{"items": 1838, "chance": 0.5},
        },
        "cloze_offline": {"word_perplexity": 931.25, "items": 62, "chance": None},
    },
    "ranks": 2,
    "limit": None,
    "lm_eval": "0.4.13",
}


def _at(step: int) -> dict[str, int]:
    return {"step": step, "tokens": step * TOKENS_A_STEP}


def _step(story: Story, step: int) -> dict[str, Any]:
    share, random = step / story.budget, story.random
    load = []
    for b in range(story.blocks):
        mass = random.dirichlet(np.full(story.experts, 30.0)) * story.live(b, step)
        load.append([int(round(value * TOKENS_A_STEP)) for value in mass])
    row = {
        **_at(step),
        "loss": float(3.2 + 5.2 * np.exp(-6 * share) + 0.12 * random.normal()),
        "lr": 3e-4 * min(1.0, step / 20) * (1 - 0.9 * share),
        "grad_norm": float(abs(random.normal()) + 0.4),
        "tokens_per_second": TOKENS_A_STEP / 0.7,
        "flops": 2.1e12 * step,
        "optimizer_bytes_by_rank": story.optimizer_bytes_by_rank(step),
        "expert_load": load or None,
    }
    if step % max(1, story.budget // 12) == 0:
        losses = {name: 2.6 + 0.3 * i + 5.2 * float(np.exp(-6 * share)) for i, name in enumerate(story.domains)}
        row["validation"] = {**losses, "mean": sum(losses.values()) / len(losses)}
    return {**row, "seconds": 0.75}


def _block(story: Story, b: int, step: int) -> dict[str, Any]:
    """What a check at ``step`` says of a block."""
    share, random, live = step / story.budget, story.random, story.live(b, step)
    values = 60 * np.exp(-0.25 * np.arange(8)) * (0.5 + share) * (1 + 0.3 * b)
    found = share > 0.05 * (b + 1)
    table = {name: random.dirichlet(np.full(story.experts, 0.8)).tolist() for name in story.domains}
    experts = []
    for k in range(story.experts):
        age = share - story.born.get(b, 0) / story.budget
        value = (1 + 0.2 * k) * (0.4 + 4 * age * np.exp(-3 * age)) * (1 + 0.05 * random.normal()) if live else None
        mode = "dormant" if not live else "frozen" if story.halted(b, k, step) else "training"
        experts.append({"expert": k, "mode": mode, "tokens": 1000 * step if live else 0, "lambda": value})
    return {
        "block": b,
        "name": _name(story, b),
        "mode": "specialising" if live else "warmup",
        "rows": 2048,
        "rank": 8,
        "singular_values": values.tolist(),
        "explained": (0.72 * values**2 / (values**2).sum()).tolist(),
        "certificate": 0.12,
        "certified_rank": 5,
        "documents": 412 + step % 7,
        "clusters": int(random.integers(2, 6)) if found else 0,
        "sizes": [100, 90] if found else [],
        "noise": 0.2 if found else 1.0,
        "largest": 0.4 if found else 0.0,
        "silhouette": float(0.2 + 0.4 * share + 0.03 * random.normal()) if found else 0.0,
        "found": found,
        "reason": "4 clusters, silhouette 0.41, noise 20%" if found else "one cluster holds 97% of the points",
        "stability": float(np.clip(0.3 + share + 0.05 * random.normal(), 0, 1)) if step > story.interval else None,
        "nmi": float(0.2 + 0.4 * share),
        "purity": float(0.4 + 0.3 * share),
        "load": [512] * story.experts if live else None,
        "imbalance": [1.5, 2.0] if live and not b else None,
        "domain_load": table if live else None,
        "experts": experts,
    }


def _name(story: Story, b: int) -> str:
    return f"model.layers.{story.blocks + b}.mlp"


def _projection(story: Story, b: int, step: int) -> dict[str, Any]:
    random = story.random
    domain = random.integers(0, len(story.domains), 300)
    angle = 2 * np.pi * domain / len(story.domains) + 0.4 * b
    points = np.stack([3 * np.cos(angle), 2 * np.sin(angle)], 1) + random.normal(size=(300, 2))
    turn = (np.arctan2(points[:, 1], points[:, 0]) + np.pi) / (2 * np.pi)
    cluster = (turn * story.experts).astype(int).clip(0, story.experts - 1)
    what = {"points": points.round(4).tolist(), "cluster": cluster.tolist()}
    return {"event": "projection", **_at(step), "block": b, **what, "domain": [story.domains[i] for i in domain]}


def _check(story: Story, step: int) -> list[dict[str, Any]]:
    """A check and what follows from it, in the controller's order."""
    entries = [_block(story, b, step) for b in range(story.blocks)]
    cost = {"seconds": {"spectrum": 0.02, "clusters": 0.09, "trainability": 0.05}, "bytes": {"spectrum": 9216}}
    events = [{"event": "check", **_at(step), **cost, "blocks": entries}]
    before, after = story.optimizer_bytes_by_rank(step), story.optimizer_bytes_by_rank(step + 1)
    sizes = {"optimizer_bytes_by_rank_before": before, "optimizer_bytes_by_rank_after": after}
    emerging = [b for b, birth in story.born.items() if birth == step]
    events += [_projection(story, b, step) for b in emerging]
    for b in emerging:
        reason = "detected: 4 clusters, silhouette 0.41, stability 0.66, 2 checks in a row"
        if b % 2:
            reason = "deadline: 10.0% of the budget is done; clusters not stable for two checks in a row"
        what = {"block": b, "name": _name(story, b), "reason": reason, "gate": "clusters of the sampled features"}
        events.append({"event": "emergence", **_at(step), **what, "clusters": 4, "output_change": 1.2e-7, **sizes})
    reasons = {
        "freeze": "lambda at 0.18 of its peak (alpha 0.2), changing by 0.030 (beta 0.05), 3 checks in a row",
        "thaw": "lambda is back at 0.55 of its peak, over 0.40, 3 checks in a row",
    }
    for kind, moments in (("freeze", story.frozen), ("thaw", story.thawed)):
        for (b, k), when in moments.items():
            if when == step:
                what = {"block": b, "name": _name(story, b), "reason": reasons[kind], "expert": k}
                value = {"lambda": entries[b]["experts"][k]["lambda"]}
                events.append({"event": kind, **_at(step), **what, **value, **sizes})
    if step >= story.budget and len(events) == 1:
        events += [_projection(story, b, step) for b in range(story.blocks)]
    return events


def _ledger(story: Story, spent: float) -> dict[str, float]:
    shares = {"forward": 0.334, "dgrad": 0.334, "wgrad": 0.329, "routing": 1e-4, "sampling": 4e-5, "spectrum": 7e-4}
    ledger = {name: share * spent for name, share in {**shares, "clusters": 2e-6}.items()}
    ledger["trainability"] = spent - sum(ledger.values())
    return {**ledger, "wgrad_saved": 0.012 * spent if story.frozen else 0.0, "validation": 0.03 * spent, "total": spent}


def _facts(story: Story) -> dict[str, Any]:
    return {
        "command": "launch/pretrain.py --run launch/runs/<quickstart>.yaml",
        "world_size": story.ranks,
        "device": "cpu",
        "model": {"style": "llama", "hidden_size": 128, "num_layers": 2 * story.blocks, "vocab_size": 4096},
        "parameters": 4_218_112,
        "data": {"prepared": "runs/quickstart/data", "manifest_sha256": "5b1f0c" + "0" * 58},
        "training": {"steps": story.budget, "seed": 1234, "micro_batch": 8, "context": 128},
        "evaluation": {"every": 25, "sequences_per_domain": 8},
        "deepspeed": {
            "zero_optimization": {"stage": 2},
            "bf16": {"enabled": True},
            "mocte": {
                "num_experts": story.experts,
                "ep_size": story.ranks,
                "check_every": 0.0167,
                "clusters": {"min_silhouette": 0.35, "stability": 0.6, "deadline": 0.1},
                "freeze": {"policy": "trainability", "alpha": 0.2, "beta": 0.05, "rows": 256},
                "router": {"kind": "token"},
                "expert": {"kind": "ffn"},
            },
        },
        "versions": {"python": "3.11.2", "torch": "2.13", "deepspeed": "0.19.8"},
    }


def write_dense_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write the logs of a run whose config has no "mocte" block: no blocks, no checks, nothing evaluated."""
    written = write_run(folder, blocks=0, emergences=False, **changes)
    written["events"] = [event for event in written["events"] if event["event"] == "save"]
    del written["facts"]["deepspeed"]["mocte"]
    for name in ("routing", "sampling", "spectrum", "clusters", "trainability"):
        written["ledger"][name] = 0.0
    written["ledger"]["total"] = sum(written["ledger"][name] for name in ("forward", "dgrad", "wgrad"))
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written["events"]))
    (folder / "run.json").write_text(json.dumps(written["facts"]))
    (folder / "ledger.json").write_text(json.dumps(written["ledger"]))
    (folder / "evaluation" / "results.json").unlink()
    return written
