"""Lets transformers' Auto classes load exported models once mocte_ds is imported, without importing transformers."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_models() -> None:
    """Register the own classes with AutoConfig, AutoModel and AutoModelForCausalLM, now or when they are imported.

    They take seconds to import, and most of this package works without them.
    """
    waiting = {}
    for name, register in _MODULES.items():
        if name in sys.modules:
            register(sys.modules[name])
        else:
            waiting[name] = register
    if waiting and not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(waiting))


class _Watcher(MetaPathFinder):
    """Finds nothing by itself; does something more when one of some modules was imported."""

    def __init__(self, waiting: dict[str, Callable[[Any], None]]) -> None:
        self.waiting = waiting

    def find_spec(self, name: str, _path: Any = None, _target: ModuleType | None = None) -> ModuleSpec | None:
        register = self.waiting.pop(name, None)
        spec = importlib.util.find_spec(name) if register else None
        if register is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register_config(module: Any) -> None:
    from mocte_ds.remote_code.configuration_blocks_mocte import MocteBlocksConfig
    from mocte_ds.remote_code.configuration_mocte import MocteLMConfig

    for config in (MocteLMConfig, MocteBlocksConfig):
        module.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models(module: Any) -> None:
    from mocte_ds.remote_code.configuration_blocks_mocte import MocteBlocksConfig
    from mocte_ds.remote_code.configuration_mocte import MocteLMConfig
    from mocte_ds.remote_code.modeling_blocks_mocte import MocteBlocksForCausalLM
    from mocte_ds.remote_code.modeling_mocte import MocteForCausalLM, MocteModel

    module.AutoModel.register(MocteLMConfig, MocteModel, exist_ok=True)
    module.AutoModelForCausalLM.register(MocteLMConfig, MocteForCausalLM, exist_ok=True)
    module.AutoModelForCausalLM.register(MocteBlocksConfig, MocteBlocksForCausalLM, exist_ok=True)
    # So that save_pretrained copies the code, which is not part of transformers.
    MocteLMConfig.register_for_auto_class()
    MocteBlocksConfig.register_for_auto_class()
    MocteBlocksForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    MocteModel.register_for_auto_class("AutoModel")
    MocteForCausalLM.register_for_auto_class("AutoModelForCausalLM")


_MODULES: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}
