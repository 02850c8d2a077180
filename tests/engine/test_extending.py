"""docs/extending.md as printed: a routing key and a freeze policy of the user's own train, are saved and resume."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mocte_ds.config import MocteConfig
from mocte_ds.errors import ConfigError
from mocte_ds.registry import Registry
from mocte_ds.trainability import policy
from tests.spawn import free_port

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def test_the_examples_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 20 for block in blocks[:2])
    (tmp_path / "script.py").write_text("\n".join(blocks), encoding="utf-8")
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **ranks, "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^\d+ emergence ", done.stdout, re.MULTILINE)) == 2, done.stdout
    frozen = re.findall(r"^\d+ freeze lambda at (0\.\d+) of its peak$", done.stdout, re.MULTILINE)
    assert frozen and all(float(share) <= 0.9 for share in frozen), done.stdout
    assert "'frozen'" in done.stdout.splitlines()[-1]


def test_names_that_nobody_registered() -> None:
    for values, told in (
        ({"router": {"kind": "tokens"}}, r"mocte.router.kind = 'tokens' .* Did you mean 'token'"),
        ({"banks": [{"kind": "token"}, {"kind": "by-id"}]}, r"mocte.banks\[1\].kind = 'by-id' .* registers it first"),
        ({"freeze": {"policy": "offf"}}, r"mocte.freeze.policy = 'offf' .* Did you mean 'off'"),
    ):
        with pytest.raises(ConfigError, match=told):
            MocteConfig.from_dict({"modules": "x", **values})


def test_a_name_is_taken_once() -> None:
    registry: Registry[object] = Registry("thing", others=["none"])

    def first() -> None: ...

    def second() -> None: ...

    registry.register("one")(first)
    registry.register("one")(first)  # its module was loaded again
    with pytest.raises(ConfigError, match="there is already a thing 'one'"):
        registry.register("one")(second)
    with pytest.raises(ConfigError, match="already a thing 'none'"):
        registry.register("none")(second)
    assert registry.get("one", "x") is first
    for name, told in (("trainability", "already"), ("off", "already")):
        with pytest.raises(ConfigError, match=told):
            policy(name)(lambda case: None)
    with pytest.raises(ConfigError, match="reads 'speed'; a probe has"):
        policy("mine", reads=["speed"])(lambda case: None)
