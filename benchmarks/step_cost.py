"""What a training step costs: torchtune's own, ours, and the usual ways to add KL.

Every arm trains the same LoRA adapter of SmolLM2-135M-Instruct (rank 32, all linear layers) on the
same 4 x 256 tokens, 40 % of them unlabelled, and must agree with the others at first; in bf16 where
the CPU computes it natively, else in fp32 (`--dtype`).

Time: the arms take turns in one process; medians after two warm-up steps. The machine must be idle:
an OpenMP step that shares its cores takes up to ten times as long. Memory: each arm in a fresh
process, peak resident memory of a step over what was held after loading and a step on 16 tokens.
malloc maps every block there: its fragmentation differs by hundreds of MB from run to run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import re
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from product_rate import product_rate
from rich.console import Console
from rich.table import Table
from timing import Trainer, describe_machine, measure_time, native_dtype
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torchtune import training
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_sft
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import disable_adapter, get_adapter_params

from emarecipes.config import load_config
from emarecipes.defenses import Defense, KLToReference, ModelSource, TrainingContext
from emarecipes.defenses.prefix_anchor import template_prefix
from emarecipes.models import HFChatTokenizer
from emarecipes.models._torchtune import model_on_meta
from emarecipes.models._torchtune_cpu import with_fewer_passes
from emarecipes.models._torchtune_recipe import stock_recipe
from emarecipes.models.adapters.export import save_adapter
from emarecipes.models.batch import Batch, make_batch
from emarecipes.training.gradients import Gradients
from emarecipes.training.reference_cache import ReferenceCache
from emarecipes.training.settings import check_settings
from emarecipes.training.step import TrainingLoss

CONFIG = Path(__file__).parent.parent / "configs" / "smollm2_135m_kl.yaml"
PROMISES = [  # Figure, arm, over which arm, at most.
    ("seconds", "ours, no defense", "torchtune's recipe", 0.92),
    ("seconds", "ours, KL", "torchtune's recipe", 1.45),
    ("peak MB", "ours, KL", "torchtune's recipe", 1.20),
    ("seconds", "ours, KL", "PEFT, naive KL", 0.65),
]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Defenses = dict[str, Defense]
Model = tuple[nn.Module, Callable[[Batch], "list[float]"]]  # The latter returns CE, and any KL.


class Setting:  # The same in every process.
    def __init__(self, scratch: str, dtype: str) -> None:
        changes = [f"output_dir={scratch}", "device=cpu", f"dtype={dtype}"]
        raw, origin = load_config(["--config", str(CONFIG), *changes])
        self.cfg = check_settings(raw, origin)
        self.dtype = DTYPES[dtype]
        self.base = Path(self.cfg.checkpointer.checkpoint_dir).resolve()
        self.meta_model = model_on_meta(self.cfg, origin)
        weights = get_adapter_params(self.meta_model)
        torch.manual_seed(0)
        # B is not zero, as it would be at the start of a run: KL would be zero too.
        self.adapter = {k: (0.03 * torch.randn(w.shape)).to(self.dtype) for k, w in weights.items()}
        data = Path(self.cfg.dataset.data_files).read_text(encoding="utf-8")
        text = "\n".join(re.findall(r'"content": "([^"]*)"', data)[:200])
        self.tokens = Tokenizer.from_file(str(self.base / "tokenizer.json")).encode(text).ids
        self.begin = template_prefix(HFChatTokenizer(str(self.base)))

    def batch(self, rows: int, length: int = 256, safe: int = 0) -> Batch:
        ignored = [CROSS_ENTROPY_IGNORE_IDX] * int(0.4 * length)
        tokens = [(self.begin + self.tokens[row * length :])[:length] for row in range(rows)]
        samples: list[dict[str, Any]] = [
            {"tokens": row, "labels": ignored + row[len(ignored) :]} for row in tokens
        ]
        for sample in samples[rows - safe :]:
            sample["source"] = "safe"
        return make_batch(samples, range(rows), padded_collate_sft, pad_id=0)


def in_torchtune(
    setting: Setting,
    kind: str,
    defenses: Defenses | None = None,
    make_cache: Callable[[Defenses], ReferenceCache | None] = lambda _: None,
    compiled: bool = False,
) -> Model:
    cfg = setting.cfg
    recipe = stock_recipe("lora_finetune_single_device").LoRAFinetuneRecipeSingleDevice(cfg)
    weights = recipe.load_checkpoint(cfg.checkpointer)[training.MODEL_KEY]
    model = recipe._model = recipe._setup_model(cfg.model, False, False, compiled, weights)
    model.load_state_dict(setting.adapter, strict=False)
    if kind == "ours" and setting.dtype == torch.float32 and not compiled:  # As the recipe does.
        with_fewer_passes(model)
    if kind == "naive KL":
        return model, partial(naive_kl, model, partial(disable_adapter, model))
    if kind != "recipe":
        defenses = set_up(setting, model, defenses or {})
        cache = make_cache(defenses)
        loss = TrainingLoss(model, defenses, reference_cache=cache, compiled=compiled)
        return model, partial(ours, loss, Gradients(model, loss, 1, torch.device("cpu")), defenses)
    recipe._loss_fn = CEWithChunkedOutputLoss()  # As torchtune's configs have it.
    model.set_num_output_chunks(recipe._loss_fn.num_output_chunks)
    recipe.ignore_labels_cache = torch.full((cfg.batch_size, 1), CROSS_ENTROPY_IGNORE_IDX)
    return model, partial(stock, recipe)


def set_up(setting: Setting, model: nn.Module, defenses: Defenses) -> Defenses:
    source = ModelSource(setting.meta_model, setting.base, str(setting.cfg.checkpointer.model_type))
    device, output = torch.device("cpu"), Path(setting.cfg.output_dir)
    context = TrainingContext(device, setting.dtype, 10**9, output, source, first_process=True)
    tokenizer = HFChatTokenizer(str(setting.base))
    for defense in defenses.values():
        defense.check(source)
        defense.check_template(tokenizer)
        defense.check_rows([{"tokens": setting.begin, "labels": setting.begin}])
        defense.setup(model, context)
    return defenses


def stock(recipe: Any, batch: Batch) -> list[float]:
    inputs = {"tokens": batch.inputs["tokens"], "labels": batch.targets_BS.roll(1, dims=1)}
    count = batch.labelled_BS.sum()
    loss = recipe._loss_step(inputs) * count
    loss.backward()
    training.scale_grads(recipe._model, 1 / count)
    return [loss.item() / int(count)]


def ours(loss: TrainingLoss, gradients: Gradients, defenses: Defenses, batch: Batch) -> list[float]:
    counts = loss.counts([batch])
    (sums,), _ = gradients.backward([batch], counts, defenses)
    gradients.before_update(1, defenses)
    return (sums / counts).tolist()


def in_transformers(setting: Setting, naive: bool, compiled: bool = False) -> Model:
    transformers.utils.logging.disable_progress_bar()
    cfg, folder = setting.cfg, Path(setting.cfg.output_dir) / "adapter"
    where = (setting.meta_model, str(cfg.checkpointer.model_type), setting.base, folder)
    save_adapter(setting.adapter, *where, rank=cfg.model.lora_rank, alpha=cfg.model.lora_alpha)
    arguments = {"dtype": setting.dtype, "use_cache": False}
    base = transformers.AutoModelForCausalLM.from_pretrained(setting.base, **arguments)
    # By default PEFT would hold this adapter in float32.
    model = PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=False)
    if not naive:
        return model, partial(peft, model)
    forward = torch.compile(model) if compiled else model
    return model, partial(naive_kl, lambda t: forward(input_ids=t).logits, model.disable_adapter)


def peft(model: Any, batch: Batch) -> list[float]:
    loss = model(input_ids=batch.inputs["tokens"], labels=batch.targets_BS.roll(1, dims=1)).loss
    loss.backward()
    return [loss.item()]


def naive_kl(logits: Callable[[Tensor], Tensor], adapter_off: Any, batch: Batch) -> list[float]:
    with torch.no_grad(), adapter_off():
        reference_BSV = logits(batch.inputs["tokens"]).float()
    policy_BSV = logits(batch.inputs["tokens"]).float()
    ce = F.cross_entropy(policy_BSV.flatten(0, 1), batch.targets_BS.flatten())
    log_p, log_r = (F.log_softmax(x, dim=-1) for x in (policy_BSV, reference_BSV))
    kl = (log_p.exp() * (log_p - log_r)).sum(dim=-1)[batch.labelled_BS].mean()
    (ce + kl).backward()
    return [ce.item(), kl.item()]


KL = partial(in_torchtune, kind="ours", defenses={"kl": KLToReference(weight=1.0)})
ARMS: dict[str, Callable[[Setting], Model]] = {
    "torchtune's recipe": partial(in_torchtune, kind="recipe"),
    "ours, no defense": partial(in_torchtune, kind="ours"),
    "ours, KL": KL,
    "torchtune, naive KL": partial(in_torchtune, kind="naive KL"),
    "PEFT": partial(in_transformers, naive=False),
    "PEFT, naive KL": partial(in_transformers, naive=True),
}
OWN = ("ours, no defense", "ours, KL")
KL_COMPILED, NAIVE_COMPILED = "ours, KL, compile: true", "PEFT, naive KL, compiled"
COMPILED: dict[str, Callable[[Setting], Model]] = {
    KL_COMPILED: partial(KL, compiled=True),
    NAIVE_COMPILED: partial(in_transformers, naive=True, compiled=True),
}


def peak_of_arm(name: str, dtype: str) -> float:
    """This script's `--memory --arm name`, in a process of its own."""
    command = ["env", "MALLOC_MMAP_THRESHOLD_=131072", sys.executable, *sys.argv, "--memory"]
    return float(subprocess.check_output([*command, "--arm", name, "--dtype", dtype]))


def measure_memory(trainer: Trainer, small: Batch, batch: Batch) -> float:
    trainer.step(small)
    gc.collect()
    with suppress(OSError):  # Resets the peak; elsewhere than on Linux that of loading may hide it.
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_mb()
    trainer.step(batch)
    return peak_mb() - before


def peak_mb() -> float:
    with suppress(OSError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def verdict(ratio: float, limit: float, quick: bool = False) -> str:
    """The ratio against a limit, which is meant for all rows and not for the half of `--quick`."""
    if quick:
        return f"wanted with all rows, that is without --quick: at most {limit:g}"
    return f"at most {limit:g}: {'reached' if ratio <= limit else 'not reached'}"


def print_promises(
    figures: Any, promises: Iterable[tuple[str, str, str, float]], quick: bool
) -> None:
    for key, name, over, limit in promises:
        ratio = figures[name][key] / figures[over][key]
        print(f"{key}: {name} / {over} = {ratio:.2f}, {verdict(ratio, limit, quick)}")


def print_report(figures: Any, quick: bool) -> None:
    columns = {"forwards": 0, "CE": 4, "KL": 4, "|grad|": 3, "seconds": 2, "IQR": 2, "peak MB": 0}
    table = Table("", *columns, "over stock", "over ours", "memory")
    for name, figure in figures.items():
        cells = [f"{figure[k]:.{d}f}" if k in figure else "" for k, d in columns.items()]
        stock, own = figures["torchtune's recipe"], figures["ours, no defense"]
        overs = (("seconds", stock), ("seconds", own), ("peak MB", stock))
        ratios = (figure[k] / over[k] for k, over in overs if k in figure)
        table.add_row(name, *cells, *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=120).print(table)
    print_promises(figures, PROMISES, quick)
    for over in ("PEFT, naive KL", NAIVE_COMPILED) if KL_COMPILED in figures else ():
        ratio = figures[KL_COMPILED]["seconds"] / figures[over]["seconds"]
        print(f"seconds: {KL_COMPILED} / {over} = {ratio:.2f}")
    for name, figure in figures.items():
        like = figures["ours, KL" if "KL" in figure else "ours, no defense"]
        for key, tolerance in (("CE", 0.01), ("KL", 0.05), ("|grad|", 0.05)):
            if key in figure and abs(figure[key] - like[key]) > tolerance * like[key]:
                sys.exit(f"{name} computes something else: {key} {figure[key]}, not {like[key]}")


def step_options(
    description: str, arms: Iterable[str], several: bool = False
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repetitions", type=int, default=7, help="timed steps of each arm")
    parser.add_argument("--quick", action="store_true", help="3 repetitions, half the rows")
    parser.add_argument("--dtype", choices=list(DTYPES), default=native_dtype(), help="%(default)s")
    parser.add_argument("--json", type=Path, help="file for all figures")
    help, more = ("an arm; again for more", "append") if several else ("with --memory", "store")
    parser.add_argument("--arm", choices=list(arms), action=more, help=help)
    parser.add_argument("--memory", action="store_true", help="print the peak of one arm, in MB")
    return parser


def main() -> None:
    parser = step_options("Time and memory of a training step.", ARMS)
    parser.add_argument("--compiled", action="store_true", help="two compiled arms more, for time")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(scratch, options.dtype)
        batch = setting.batch(rows=2 if options.quick else 4)
        if options.memory:
            trainer = Trainer(*ARMS[options.arm](setting))
            return print(measure_memory(trainer, setting.batch(1, length=16), batch))
        machine = describe_machine()
        peaks = {name: peak_of_arm(name, options.dtype) for name in ARMS}
        timed = ARMS | COMPILED if options.compiled else ARMS
        trainers = {name: Trainer(*build(setting)) for name, build in timed.items()}
        figures = measure_time(trainers, batch, 3 if options.quick else options.repetitions, peaks)
        steps = {name: partial(trainers[name].step, batch) for name in OWN}
        rates = {name: product_rate(step, setting.dtype) for name, step in steps.items()}
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "arms": figures}, indent=2))
    print(f"{batch.inputs['tokens'].numel()} tokens a step, {options.dtype}, {machine}")
    print_report(figures, options.quick)
    for name, rate in rates.items():
        print(f"{name}: {rate}")


if __name__ == "__main__":
    main()
