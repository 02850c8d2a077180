"""What can be trained or frozen on its own, and the optimizer's parameter groups that follow from it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mocte_ds.errors import ConfigError
from mocte_ds.moe.block import Block
from mocte_ds.zero.cut import is_cut
from mocte_ds.zero.front import EMBEDDINGS, Front, layer_unit

TRUNK = "trunk"


@dataclass(frozen=True)
class Unit:
    """A partition unit of the ZeRO optimizer on this rank."""

    name: str
    """`trunk`, `front.embeddings`, `front.<layer>`, `<block>.dense`, `<block>.router` or `<block>.<global expert>`."""
    parameters: tuple[nn.Parameter, ...]
    """Parameters in the order of the model."""
    process_group: str | None
    """DeepSpeed's name of the expert group (`ep_size_N`); None for parameters that all data-parallel ranks share."""


def dense_unit(block: Block) -> str:
    """Name of the unit of a block's dense or shared FFN."""
    return f"{block.name}.dense"


def router_unit(block: Block) -> str:
    """Name of the unit of a block's learned routers."""
    return f"{block.name}.router"


def expert_unit(block: Block, expert: int) -> str:
    """Name of the unit of a block's expert, counted over all ranks and banks."""
    return f"{block.name}.{expert}"


class UnitRegistry:
    """All units of a model and the optimizer options of their parameters."""

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        ep_rank: int,
        given: Iterable[Any] | None,
        front: Front | None = None,
    ) -> None:
        """Find the units.

        Args:
            model: with its blocks attached.
            blocks: the blocks.
            ep_rank: this rank's place in its expert-parallel group.
            given: the user's `model_parameters`: parameters, parameter groups, or None for all parameters of the
                model, without weight decay on vectors (norms and biases).
            front: what may be frozen from below, as units of its own; None: it belongs to the trunk.

        Raises:
            ConfigError: the groups leave out a part of a block.
        """
        self.units: dict[str, Unit] = {}
        self.front = front
        placed: set[int] = set()
        for block in blocks:
            # What the user has frozen of an FFN stays so in the experts that are born as its copies.
            fixed = {name for name, p in block.dense.named_parameters() if not p.requires_grad}
            of_experts = fixed if block.kind == "ffn" else set()
            self._add(dense_unit(block), _but(block.dense, fixed), None)
            for number, bank in enumerate(block.banks):
                for local, expert in enumerate(bank.local_experts):
                    k = number * bank.num_experts + bank.first_local(ep_rank) + local
                    self._add(expert_unit(block, k), _but(expert, of_experts), bank.expert_group_name)
            routers = [parameter for bank in block.banks for parameter in bank.gate.parameters()]
            if routers:
                self._add(router_unit(block), routers, None)
            placed.update(id(p) for p in block.parameters())
        if front is not None:
            for name, parameters in [(EMBEDDINGS, front.embeddings)] + [
                (layer_unit(i), tuple(layer.parameters())) for i, layer in enumerate(front.layers)
            ]:
                self._add(name, [p for p in parameters if id(p) not in placed and p.requires_grad], None)
                placed.update(id(p) for p in parameters)
        rest = [p for p in model.parameters() if id(p) not in placed and p.requires_grad]
        self.units = {TRUNK: Unit(TRUNK, tuple(rest), None), **self.units}
        self.options, self._option_of = _options(model, blocks, given)
        _give_routers_their_own(blocks, self.options, self._option_of)
        _give_cut_their_own(model, self.options, self._option_of)
        if not self.groups_of(self.units[TRUNK]):
            raise ConfigError(
                "nothing outside of the blocks trains: ranks whose experts are all frozen would have no optimizer. Let "
                "at least one parameter outside of mocte.modules train (and outside of mocte.freeze.prefix)."
            )
        # What is left out of the trunk and of the front does not train.
        of_blocks = [unit for name, unit in self.units.items() if name != TRUNK and not name.startswith("front.")]
        missing = [unit.name for unit in of_blocks for p in unit.parameters if id(p) not in self._option_of]
        if missing:
            raise ConfigError(
                f"model_parameters leaves out parameters of {missing[0]}; hand over the FFNs of all blocks."
            )

    def groups(self, trainable: Iterable[str]) -> list[dict[str, Any]]:
        """Parameter groups of the trainable units, always in the same order; one group per unit and set of options."""
        wanted, result = set(trainable), []
        for unit in self.units.values():
            if unit.name in wanted:
                result.extend(self.groups_of(unit))
        return result

    def groups_of(self, unit: Unit) -> list[dict[str, Any]]:
        """Parameter groups of one unit."""
        result = []
        for number, options in enumerate(self.options):
            parameters = [p for p in unit.parameters if self._option_of.get(id(p)) == number]
            if parameters:
                # DeepSpeed finds the process group of a group with "moe" by its name.
                name = unit.process_group or f"{unit.name}/{number}"
                mine = {"name": name, "moe": unit.process_group is not None, "unit": unit.name, "options": number}
                result.append({**options, "params": parameters, **mine})
        return result

    def _add(self, name: str, parameters: Iterable[nn.Parameter], process_group: str | None) -> None:
        self.units[name] = Unit(name, tuple(parameters), process_group)


def _give_routers_their_own(blocks: list[Block], options: list[dict[str, Any]], option_of: dict[int, int]) -> None:
    """Trained routers have no weight decay, which would pull them to even odds, and a part of the learning rate.

    Args:
        blocks: the blocks.
        options: sets of options; new ones are added, with the number of the set that a scheduler treats them like.
        option_of: by id of a parameter; changed.
    """
    for bank in (bank for block in blocks for bank in block.banks if bank.gate.router.learn):
        for parameter in bank.gate.parameters():
            if id(parameter) in option_of:
                usual = option_of[id(parameter)]
                own = {**options[usual], "weight_decay": 0.0, "rate": bank.gate.router.rate, "like": usual}
                if own not in options:
                    options.append(own)
                option_of[id(parameter)] = options.index(own)


def _give_cut_their_own(model: nn.Module, options: list[dict[str, Any]], option_of: dict[int, int]) -> None:
    """Groups of parameters that tensor parallelism has cut hold no whole ones: gradients of the latter count once.

    Args:
        model: with its blocks attached, and cut.
        options: as of :func:`_give_routers_their_own`.
        option_of: as there.
    """
    for parameter in model.parameters():
        if is_cut(parameter) and id(parameter) in option_of:
            usual = option_of[id(parameter)]
            own = {**options[usual], "cut": True, "like": usual}
            if own not in options:
                options.append(own)
            option_of[id(parameter)] = options.index(own)


def _but(module: nn.Module, names: set[str]) -> list[nn.Parameter]:
    """Parameters of a module except some."""
    return [parameter for name, parameter in module.named_parameters() if name not in names]


def _options(
    model: nn.Module, blocks: list[Block], given: Iterable[Any] | None
) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Distinct sets of optimizer options, and which of them each parameter (by id) has.

    Experts do not exist yet when a user sorts his parameters into groups: `ffn` experts take the options of the dense
    FFN's parameter of the same name, `lora` experts and learned routers those of a parameter with as many dimensions.
    """
    option_of: dict[int, int] = {}
    if given is None:
        options: list[dict[str, Any]] = [{}, {"weight_decay": 0.0}]
        for parameter in model.parameters():
            option_of[id(parameter)] = 0 if parameter.dim() >= 2 else 1
        return options, option_of
    groups = [item if isinstance(item, Mapping) else {"params": [item]} for item in given]
    options = []
    for group in groups:
        own = {key: value for key, value in group.items() if key not in ("params", "name", "moe")}
        if own not in options:
            options.append(own)
        parameters = group["params"]
        for parameter in [parameters] if isinstance(parameters, nn.Parameter) else parameters:
            option_of[id(parameter)] = options.index(own)
    for block in blocks:
        dense = {name: option_of[id(p)] for name, p in block.dense.named_parameters() if id(p) in option_of}
        by_dims = {p.dim(): option_of[id(p)] for p in block.dense.parameters() if id(p) in option_of}
        for bank in block.banks:
            newcomers = [item for expert in bank.local_experts for item in expert.named_parameters()]
            for name, parameter in [*newcomers, *bank.gate.named_parameters()]:
                option = dense.get(name, by_dims.get(parameter.dim()))
                if option is not None:
                    option_of[id(parameter)] = option
    return options, option_of
