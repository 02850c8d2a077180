"""A run folder as launch/pretrain.py writes it, with invented but lifelike numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np

DOMAINS = ["encyclopedia", "python", "medicine", "law"]
TOKENS_A_STEP = 8192


def write_run(
    folder: Path,
    blocks: int = 2,
    experts: int = 4,
    ranks: int = 2,
    steps: int = 300,
    budget: int = 300,
    emergences: bool = True,
    freezes: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the logs of a run.

    Returns:
        ``metrics``, ``events``, ``ledger``, ``evaluation`` and ``facts`` as they were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    born = {b: budget * (b + 2) // 20 // 5 * 5 for b in range(blocks)} if emergences else {}
    frozen = _freeze_steps(blocks, experts, budget) if emergences and freezes else {}
    metrics, events = [], []
    for step in range(1, steps + 1):
        metrics.append(_step(random, step, budget, blocks, experts, ranks, born, frozen))
        if step % max(1, budget // 60) == 0:
            events += _check(random, step, budget, blocks, experts, ranks, born, frozen)
        if step % 100 == 0:
            save = {"event": "save", "step": step, "tokens": step * TOKENS_A_STEP}
            events.append({**save, "checkpoint": f"step{step}", "seconds": 0.25})
    spent = metrics[-1]["flops"]
    shares = {"forward": 0.334, "dgrad": 0.334, "wgrad": 0.329, "routing": 1e-4, "sampling": 4e-5, "spectrum": 7e-4}
    shares.update(clusters=2e-6)
    ledger = {name: share * spent for name, share in shares.items()}
    ledger["trainability"] = spent - sum(ledger.values())
    ledger.update(wgrad_saved=0.012 * spent if frozen else 0.0, validation=0.03 * spent, total=spent)
    facts = _facts(blocks, experts, ranks, budget)
    evaluation = {
        "results": {
            "copa": {"alias": "copa", "acc,none": 0.57, "acc_stderr,none": 0.0498},
            "piqa": {"alias": "piqa", "acc,none": 0.5267, "acc_stderr,none": 0.0116, "acc_norm,none": 0.5155},
            "cloze": {"alias": "cloze", "word_perplexity,none": 931.25, "word_perplexity_stderr,none": "N/A"},
        },
        "n-samples": {"copa": {"original": 100, "effective": 100}, "piqa": {"original": 1838, "effective": 1838}},
    }
    _write_lines(folder / "metrics.jsonl", metrics)
    _write_lines(folder / "events.jsonl", events)
    (folder / "ledger.json").write_text(json.dumps(ledger))
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "results.json").write_text(json.dumps(evaluation))
    return {"metrics": metrics, "events": events, "ledger": ledger, "evaluation": evaluation, "facts": facts}


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _freeze_steps(blocks: int, experts: int, budget: int) -> dict[tuple[int, int], int]:
    slow = max(1, budget // 60)
    chosen = [(b, k) for b in range(blocks) for k in range(experts) if (b + 2 * k) % 3 == 0]
    return {who: (budget // 2 + 3 * i * slow) // slow * slow for i, who in enumerate(chosen)}


def _bytes(step: int, blocks: int, experts: int, ranks: int, born: dict, frozen: dict) -> list[int]:
    expert = 300_000
    alive = sum(
        born.get(b, 10**9) < step and frozen.get((b, k), 10**9) >= step for b in range(blocks) for k in range(experts)
    )
    dense = sum(born.get(b, 10**9) >= step for b in range(blocks))
    return [12 * (2_000_000 + (alive + dense) * expert) // ranks + 1200 * rank for rank in range(ranks)]


def _validation(share: float) -> dict[str, float]:
    losses = {name: 2.6 + 0.5 * i + 5.2 * np.exp(-6 * share) for i, name in enumerate(DOMAINS)}
    return {**{k: float(v) for k, v in losses.items()}, "mean": float(np.mean(list(losses.values())))}


def _step(
    random: np.random.Generator, step: int, budget: int, blocks: int, experts: int, ranks: int, born: dict, frozen: dict
) -> dict[str, Any]:
    share, load = step / budget, None
    if any(born.get(b, 10**9) < step for b in range(blocks)):
        load = []
        for b in range(blocks):
            mass = random.dirichlet(np.full(experts, 30.0)) * (born.get(b, 10**9) < step)
            load.append([int(round(value * TOKENS_A_STEP)) for value in mass])
    row = {
        "step": step,
        "tokens": step * TOKENS_A_STEP,
        "loss": float(3.2 + 5.2 * np.exp(-6 * share) + 0.12 * random.normal()),
        "lr": 3e-4 * min(1.0, step / 20) * (1 - 0.9 * share),
        "grad_norm": float(abs(random.normal()) + 0.4),
        "tokens_per_second": TOKENS_A_STEP / 0.7,
        "seconds": 0.75,
        "flops": 2.1e12 * step,
        "optimizer_bytes": _bytes(step, blocks, experts, ranks, born, frozen),
        "expert_load": load,
    }
    if step == 1 or step % max(1, budget // 12) == 0:
        row["validation"] = _validation(share)
    return row


def _block(
    random: np.random.Generator, b: int, step: int, budget: int, blocks: int, experts: int, born: dict, frozen: dict
) -> dict[str, Any]:
    share = step / budget
    live = born.get(b, 10**9) < step
    values = 60 * np.exp(-0.25 * np.arange(8)) * (0.5 + share) * (1 + 0.3 * b)
    found = share > 0.05 * (b + 1)
    table = None
    if live:
        rows = random.dirichlet(np.full(experts, 0.8), len(DOMAINS))
        table = {name: rows[i].tolist() for i, name in enumerate(DOMAINS)}
    entries = []
    for k in range(experts):
        halted = frozen.get((b, k), 10**9) < step
        age = share - born.get(b, 0) / budget
        value = (1 + 0.2 * k) * (0.4 + 4 * age * np.exp(-3 * age)) * (1 + 0.05 * random.normal()) if live else None
        mode = "frozen" if halted else "training" if live else "dormant"
        entries.append({"expert": k, "mode": mode, "tokens": 1000 * step if live else 0, "lambda": value})
    return {
        "block": b,
        "name": f"model.layers.{blocks + b}.mlp",
        "mode": "specialising" if live else "warmup",
        "rows": 2048,
        "rank": 8,
        "singular_values": values.tolist(),
        "explained": (0.72 * values**2 / (values**2).sum()).tolist(),
        "certificate": 0.12,
        "documents": 412 + step % 7,
        "clusters": int(random.integers(2, 6)) if found else int(random.integers(0, 2)),
        "sizes": [100, 90] if found else [400],
        "noise": 0.2,
        "largest": 0.4 if found else 0.97,
        "silhouette": float(0.2 + 0.4 * share + 0.03 * random.normal()) if found else None,
        "stability": float(min(1, 0.3 + share + 0.05 * random.normal())) if step > budget // 60 else None,
        "found": bool(found),
        "reason": "found" if found else "one cluster holds 97 % of the documents",
        "nmi": float(0.2 + 0.4 * share),
        "purity": float(0.4 + 0.3 * share),
        "load": [512] * experts if live else None,
        "domain_load": table,
        "experts": entries,
    }


def _projection(random: np.random.Generator, b: int, experts: int) -> dict[str, Any]:
    domain = random.integers(0, len(DOMAINS), 300)
    angle = 2 * np.pi * domain / len(DOMAINS) + 0.4 * b
    points = np.stack([3 * np.cos(angle), 2 * np.sin(angle)], 1) + random.normal(size=(300, 2))
    cluster = (
        ((np.arctan2(points[:, 1], points[:, 0]) + np.pi) / (2 * np.pi) * experts).astype(int).clip(0, experts - 1)
    )
    names = [DOMAINS[i] for i in domain]
    return {
        "event": "projection",
        "block": b,
        "points": points.round(4).tolist(),
        "cluster": cluster.tolist(),
        "domain": names,
    }


def _check(
    random: np.random.Generator, step: int, budget: int, blocks: int, experts: int, ranks: int, born: dict, frozen: dict
) -> list[dict]:
    at = {"step": step, "tokens": step * TOKENS_A_STEP}
    entries = [_block(random, b, step, budget, blocks, experts, born, frozen) for b in range(blocks)]
    seconds = {"spectrum": 0.02, "clusters": 0.09, "trainability": 0.05}
    events = [
        {"event": "check", **at, "seconds": seconds, "bytes": {"spectrum": 9216, "clusters": 13184}, "blocks": entries}
    ]
    before, after = (_bytes(s, blocks, experts, ranks, born, frozen) for s in (step, step + 1))
    sizes = {"optimizer_bytes_before": before, "optimizer_bytes_after": after}
    for b, birth in born.items():
        if birth == step:
            events.append({**at, **_projection(random, b, experts)})
            reason = "detected: 4 clusters, silhouette 0.41, stability 0.66, 2 checks in a row"
            if b % 2:
                reason = "deadline: 10.0% of the budget is done; clusters not stable for two checks in a row"
            name = f"model.layers.{blocks + b}.mlp"
            what = {
                "event": "emergence",
                "block": b,
                "name": name,
                "reason": reason,
                "clusters": 4,
                "output_change": 1.2e-7,
            }
            events.append({**at, **what, **sizes})
    for (b, k), when in frozen.items():
        if when == step:
            what = {"event": "freeze", "block": b, "name": f"model.layers.{blocks + b}.mlp", "expert": k}
            value = entries[b]["experts"][k]["lambda"]
            events.append({**at, **what, "reason": "rate 4e-4 < 1e-3 at 3 checks in a row", "lambda": value, **sizes})
    if step >= budget:
        events += [{**at, **_projection(random, b, experts)} for b in born]
    return events


def _facts(blocks: int, experts: int, ranks: int, budget: int) -> dict[str, Any]:
    return {
        "command": "launch/pretrain.py --run launch/runs/<quickstart>.yaml",
        "world_size": ranks,
        "device": "cpu",
        "model": {"style": "llama", "hidden_size": 128, "num_layers": 2 * blocks, "vocab_size": 4096},
        "parameters": 4_218_112,
        "data": {"prepared": "runs/quickstart/data", "manifest_sha256": "5b1f0c" + "0" * 58},
        "training": {"steps": budget, "seed": 1234, "micro_batch": 8, "context": 128},
        "evaluation": {"every": 30, "sequences_per_domain": 8},
        "deepspeed": {
            "zero_optimization": {"stage": 2},
            "bf16": {"enabled": True},
            "mocte": {
                "num_experts": experts,
                "ep_size": ranks,
                "check_every": 0.0167,
                "clusters": {"min_silhouette": 0.35, "stability": 0.6, "deadline": 0.1},
                "freeze": {"policy": "default", "alpha": 0.1},
                "router": {"kind": "token"},
                "expert": {"kind": "ffn"},
            },
        },
        "versions": {"python": "3.11.2", "torch": "2.13", "deepspeed": "0.19.8"},
    }
