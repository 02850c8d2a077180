"""The "mocte" block: what is wrong is named with its value, what is allowed and the nearest valid name."""

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from mocte_ds.config import MocteConfig, SpectrumConfig
from mocte_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "mocte.modules is missing"),
        ({"modules": "m", "num_expert": 4}, r"mocte.num_expert \(value 4\).*'num_experts'"),
        ({"modules": "m", "router": {"kind": "tokn"}}, "mocte.router.kind = 'tokn'.*'token'"),
        ({"modules": "m", "num_experts": 4, "ep_size": 3}, r"ep_size = 3 does not divide.*\[1, 2, 4\]"),
        ({"modules": "m", "num_experts": "4"}, "mocte.num_experts = '4' must be of type int"),
        ({"modules": "m", "total_steps": "x"}, "of type int or null"),
        ({"modules": "m", "auto": 1}, "mocte.auto = 1 must be of type bool"),
        ({"modules": "m", "clusters": {"deadline": 3}}, "clusters.deadline = 3.0.*between 0 and 1"),
        ({"modules": "m", "expert": {"kind": "ffn", "width": 3}}, "expert.width is for kind 'lora'"),
        ({"modules": "m", "router": {"kind": "hash", "weight": "softmax"}}, "needs logits"),
        ({"modules": "m", "num_experts": 512}, "more than spectrum.rows"),
        ({"modules": "m", "spectrum": {"doublings": 14}}, "rows = 2048; with so many rows it can be 13 at most"),
        ({"modules": "m", "spectrum": {"doublings": 17}}, "doublings = 17 must"),
        ({"modules": "m", "spectrum": {"rows": 1 << 24, "doublings": 1}}, "it can be 0 at most"),
        ({"modules": "m", "spectrum": 3}, "mocte.spectrum must be a section"),
        ({"modules": "m", "checkpoint": {"asyncsave": True}}, "unknown key mocte.checkpoint.asyncsave.*'async_save'"),
    ],
)
def test_errors(block, message):
    with pytest.raises(ConfigError, match=message):
        MocteConfig.from_dict(block)


def test_world_size():
    with pytest.raises(ConfigError, match=r"the 3 ranks of the run; allowed with 4 experts: \[1\]"):
        MocteConfig.from_dict({"modules": "m", "num_experts": 4, "ep_size": 2}, world_size=3)


def test_round_trip():
    config = MocteConfig.from_dict({"modules": ["a", "b"], "freeze": {"alpha": 0, "policy": "paper"}})
    assert MocteConfig.from_dict(config.to_dict()) == config
    assert config.freeze.alpha == 0.0 and config.num_experts == 4
    assert MocteConfig.from_dict({"modules": "m", "router": None}) == MocteConfig.from_dict({"modules": "m"})
    banks = MocteConfig.from_dict({"modules": "m", "router": None, "banks": [{"kind": "type"}, {"kind": "hash"}]})
    assert [router.kind for router in banks.routers] == ["type", "hash"]
    assert MocteConfig.from_dict(banks.to_dict()) == banks


def test_the_papers_preset_fills_in_what_is_left_out():
    def made(**block):
        return MocteConfig.from_dict({"modules": "m", **block})

    assert made().router.kind == "type" and made().freeze.policy == "trainability"
    paper = made(preset="paper")
    freeze = {"policy": "paper", "alpha": 0.1, "beta": 0.001, "checks": 1}
    assert paper == replace(made(router={"kind": "token"}, freeze=freeze), preset="paper")
    assert MocteConfig.from_dict(paper.to_dict()) == paper
    other = made(preset="paper", banks=[{"kind": "hash"}], freeze={"policy": "random", "rows": 32})
    assert [router.kind for router in other.routers] == ["hash"]
    assert (other.freeze.policy, other.freeze.alpha, other.freeze.rows) == ("random", 0.1, 32)
    assert made(preset="paper", router=None, freeze=None) == paper
    with pytest.raises(ConfigError, match="mocte.preset = 'papers' is not one of .* Did you mean 'paper'"):
        made(preset="papers")
    with pytest.raises(ConfigError, match="mocte.freeze must be a section"):
        made(preset="paper", freeze=3)


def test_no_section_is_made_without_its_checks():
    """By hand, by dataclasses.replace, before and after pydantic has built a schema, whatever the order."""
    for make in (
        lambda: SpectrumConfig(rows=3),
        lambda: replace(SpectrumConfig(), rows=3),
        lambda: MocteConfig("m", spectrum=SpectrumConfig(rows=3)),
        lambda: replace(MocteConfig.from_dict({"modules": "m"}).spectrum, rows=3),
    ):
        for _ in range(2):
            with pytest.raises(ConfigError, match="mocte.spectrum.rows = 3 must be 16 or more"):
                make()
    config = MocteConfig.from_dict({"modules": "m"})
    with pytest.raises(ConfigError, match="mocte.ep_size = 2 does not divide mocte.num_experts = 3"):
        replace(config, num_experts=3, ep_size=2)
    with pytest.raises(FrozenInstanceError):
        config.seed = 3
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_section_that_is_missing_a_key_says_what_belongs_there():
    with pytest.raises(ConfigError, match=r"mocte.modules is missing. Glob, or list of globs, of the FFN modules"):
        MocteConfig.from_dict({})
    with pytest.raises(ConfigError, match=r"unknown key mocte.module .* Did you mean 'modules'\?"):
        MocteConfig.from_dict({"module": "m"})


def test_tuples_of_a_config_written_in_python() -> None:
    config = MocteConfig.from_dict({"modules": ("a.*", "b.*"), "banks": ({"kind": "token"}, {"kind": "hash"})})
    assert config.modules == ["a.*", "b.*"] and [router.kind for router in config.routers] == ["token", "hash"]
