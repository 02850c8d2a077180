"""What only its user may read is in no log, checkpoint or report."""

import json
from pathlib import Path

from mocte_ds.report import read_run, write_report
from mocte_ds.report.overview import everything
from mocte_ds.secret_keys import command_shown, without_secrets

CONFIG = {
    "comet": {"enabled": True, "api_key": "S3CRET", "workspace": "lab"},
    "wandb": {"team": "t", "WANDB_TOKEN": "S3CRET"},
    "nested": [{"password": "S3CRET", "kept": 1}, ("a", {"client_secret": "S3CRET"})],
    "train_micro_batch_size_per_gpu": 4,
}


def test_configs() -> None:
    kept = without_secrets(CONFIG)
    assert "S3CRET" not in json.dumps(kept)
    assert kept["comet"] == {"enabled": True, "workspace": "lab"} and kept["nested"] == [{"kept": 1}, ("a", {})]
    assert kept["train_micro_batch_size_per_gpu"] == 4 and CONFIG["comet"]["api_key"] == "S3CRET"


def test_commands() -> None:
    words = ["train.py", "--set", "deepspeed.comet.api_key=S3CRET", "--hub_token", "S3CRET", "--keys", "3"]
    words += ['deepspeed.comet={"api_key": "S3CRET", "enabled": true}', "x={'wandb_token':'S3CRET'}", "--token=S3CRET"]
    words += ["deepspeed.comet={api_key: S3CRET, enabled: true}", "training.batch_tokens=512"]
    told = command_shown(words)
    assert "S3CRET" not in told and "--keys 3" in told and "enabled" in told and told.startswith("train.py --set")
    assert told.endswith("training.batch_tokens=512")


def test_a_run_json_of_an_earlier_version(tmp_path: Path) -> None:
    """Its report does not show what it should not have kept."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 2.0, "lr": 0.1}\n')
    (tmp_path / "run.json").write_text(json.dumps({"command": "x --set a.api_key=S3CRET", "deepspeed": CONFIG}))
    assert "S3CRET" not in everything(read_run(tmp_path)) and "lab" in everything(read_run(tmp_path))
    write_report(tmp_path, tmp_path / "report", progress=False)
    assert "S3CRET" not in (tmp_path / "report" / "index.html").read_text()
