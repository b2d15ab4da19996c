"""torchtune's LoRA recipes: the parts of them that a run of ours is made with.

torchtune 0.6.1 is its last release; what is used here will not change under us.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchtune
from omegaconf import DictConfig
from torch.distributed.fsdp import FSDPModule
from torchtune import training

from emarecipes.models._torchtune_convert import fix_loaded_state
from emarecipes.models._undrawn import Undrawn


class StockRecipe:
    """torchtune's LoRA recipe for one device or for several, of which four methods are called.

    They load the checkpoint, build the model (and shard it), the optimizer and the profiler. Its
    loop, data, loss and saving are not used.

    Attributes:
        device: The process's.
        dtype: Of weights and products.
        seed: The config's. Where that has none, one that is drawn, the same on every process.

    Args:
        cfg: The run's config, checked.
        distributed: Whether there are several processes; their group must be there.
    """

    def __init__(self, cfg: DictConfig, *, distributed: bool) -> None:
        name = "Distributed" if distributed else "SingleDevice"
        file = "distributed" if distributed else "single_device"
        module = stock_recipe(f"lora_finetune_{file}")
        self._recipe: Any = getattr(module, f"LoRAFinetuneRecipe{name}")(cfg)
        self._cfg = cfg
        self._distributed = distributed
        self.device: torch.device = self._recipe._device
        self.dtype: torch.dtype = self._recipe._dtype
        self.seed = int(self._recipe.seed)

    def build_model(self) -> Any:
        """The model on its device with the base's weights, sharded if there are several processes.

        Adapters are trainable and not drawn yet: see `initialize_adapter`.
        """
        cfg, recipe = self._cfg, self._recipe
        loaded = recipe.load_checkpoint(cfg.checkpointer)[training.MODEL_KEY]
        arguments: dict[str, Any] = {
            "cfg_model": cfg.model,
            "enable_activation_checkpointing": cfg.enable_activation_checkpointing,
            "enable_activation_offloading": cfg.enable_activation_offloading,
            "base_model_state_dict": fix_loaded_state(loaded, str(cfg.checkpointer.model_type)),
        }
        if self._distributed:
            recipe._compile = cfg.compile
            arguments |= {
                "custom_sharded_layers": cfg.custom_sharded_layers,
                "fsdp_cpu_offload": cfg.fsdp_cpu_offload,
                "reshard_after_forward": cfg.fsdp_reshard_after_forward,
            }
        else:
            torchtune.modules.common_utils._use_low_cpu_ram = cfg.low_cpu_ram
            arguments["compile_model"] = cfg.compile
        with Undrawn():
            recipe._model = recipe._setup_model(**arguments)
        for module in recipe._model.modules() if self.device.type == "cpu" else ():
            if isinstance(module, FSDPModule):
                # torch 2.8's gloo takes the average of a reduce-scatter for the sum, in silence
                # (github.com/pytorch/pytorch/issues/162338).
                module.set_force_sum_reduction_for_comms(True)
        return recipe._model

    @property
    def activations(self) -> Any:
        """The context for forwards that `enable_activation_offloading` asks for; else an empty one.

        There once the model is built.
        """
        return self._recipe.activations_handling_ctx

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The config's, over the parameters of the model that was built."""
        optimizer: torch.optim.Optimizer = self._recipe._setup_optimizer(self._cfg.optimizer)
        return optimizer

    def build_profiler(self) -> Any:
        """The config's, with `start`, `step` and `stop`; without one, they do nothing."""
        return self._recipe._setup_profiler(self._cfg.profiler)


def stock_recipe(name: str) -> ModuleType:
    """One of torchtune's recipe files, for example `lora_finetune_distributed`, as a module.

    torchtune installs its recipes as a top-level package that refuses to be imported; they are
    loaded by path.
    """
    module_name = f"_torchtune_{name}"
    if module_name not in sys.modules:
        path = Path(torchtune.__file__).parent.parent / "recipes" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
        vars(module)["training"] = _TrainingOnAnyDevice()
    return sys.modules[module_name]


class _TrainingOnAnyDevice:
    """`torchtune.training` whose memory report does not raise on a CPU.

    The distributed recipe's `_setup_model` asks for it on every device.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(training, name)

    @staticmethod
    def get_memory_stats(device: torch.device, reset_stats: bool = True) -> dict[str, float]:
        return {} if device.type == "cpu" else training.get_memory_stats(device, reset_stats)

    @staticmethod
    def log_memory_stats(stats: dict[str, float], **kwargs: Any) -> None:
        if stats:
            training.log_memory_stats(stats, **kwargs)
