"""torchtune's own LoRA recipe, unchanged but for what a CPU needs, from our initial adapter.

Run as a script, `python stock_run.py --config C`, or under torchrun. Losses go to DiskLogger.
"""

import torch.distributed as dist
from omegaconf import DictConfig
from torchtune import config, training

from emarecipes.models._torchtune_recipe import stock_recipe
from emarecipes.training.initialize import initialize_adapter


@config.parse
def main(cfg: DictConfig) -> None:
    if training.is_distributed():
        dist.init_process_group("gloo")
        module = stock_recipe("lora_finetune_distributed")
        # torch.cpu has no cache to empty.
        module.training.cleanup_before_training = lambda: None
        recipe = module.LoRAFinetuneRecipeDistributed(cfg)
    else:
        recipe = stock_recipe("lora_finetune_single_device").LoRAFinetuneRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    initialize_adapter(recipe._model, cfg.seed)
    recipe.save_checkpoint = lambda epoch: None
    recipe.train()
    if training.is_distributed():
        dist.barrier()
    recipe.cleanup()


if __name__ == "__main__":
    main()
