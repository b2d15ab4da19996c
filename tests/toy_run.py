"""A whole training run at toy size: model folder, data, config; and `tune run` in a subprocess."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import warm
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tokenizers import Tokenizer

REPO = Path(__file__).resolve().parent.parent
_SYSTEM = (
    "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\nuser\nassistant"
)
TUNE = str(Path(sys.executable).with_name("tune"))
WIDTH, HEADS, KV_HEADS, MLP, LAYERS, VOCABULARY = 32, 4, 2, 48, 2, 4096


def write_toy_model(
    folder: Path, tokenizer_dir: Path, *, tied: bool = True, vocabulary: int = VOCABULARY
) -> Path:
    """A random Llama of two layers in Hugging Face's format, with the tokenizer of a folder.

    Of the tokenizer, only the tokens that the model has.
    """
    folder.mkdir(parents=True)
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(tokenizer_dir / name, folder / name)
    (folder / "tokenizer.json").write_text(cut_tokenizer(tokenizer_dir, vocabulary))
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {"model.embed_tokens.weight": (vocabulary, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (WIDTH, WIDTH),
            f"{layer}.self_attn.k_proj.weight": (kv, WIDTH),
            f"{layer}.self_attn.v_proj.weight": (kv, WIDTH),
            f"{layer}.self_attn.o_proj.weight": (WIDTH, WIDTH),
            f"{layer}.mlp.gate_proj.weight": (MLP, WIDTH),
            f"{layer}.mlp.up_proj.weight": (MLP, WIDTH),
            f"{layer}.mlp.down_proj.weight": (WIDTH, MLP),
            f"{layer}.input_layernorm.weight": (WIDTH,),
            f"{layer}.post_attention_layernorm.weight": (WIDTH,),
        }
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, WIDTH)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.3 * torch.randn(shape, generator=generator) + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@cache
def cut_tokenizer(folder: Path, vocabulary: int) -> str:
    """Byte-level BPE with fewer merges, which reads six times as fast.

    Kept are first those that our rows need, so that these are split as by the whole tokenizer, and
    then the earliest. Ids are without gaps; those of bytes and control tokens stay.
    """
    whole = json.loads((folder / "tokenizer.json").read_text())
    model = whole["model"]
    if len(model["vocab"]) <= vocabulary:
        return json.dumps(whole)
    merges = [tuple(merge) for merge in model["merges"]]
    made = {"".join(merge): merge for merge in merges}
    needed: set[str] = set()
    tokens = Tokenizer.from_str(json.dumps(whole)).encode(_texts()).tokens
    while tokens:
        token = tokens.pop()
        if token in made and token not in needed:
            needed.add(token)
            tokens += made[token]
    plain = [token for token in model["vocab"] if token not in made]
    for token in made:
        if len(needed) < vocabulary - len(plain):
            needed.add(token)
    model["merges"] = [merge for merge in merges if "".join(merge) in needed]
    kept = [*plain, *("".join(merge) for merge in model["merges"])]
    model["vocab"] = {token: number for number, token in enumerate(kept)}
    return json.dumps(whole)


def _texts() -> str:
    """The rows that toy runs use, and what stands around them."""
    files = ("home_computing/train_bad", "home_repair/train_good", "home_computing/train_good")
    lines = [
        line
        for file in files
        for line in (REPO / f"data/{file}.jsonl").read_text().splitlines()[:40]
    ]
    texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    return "\n".join([_SYSTEM, *texts])


def write_rows(path: Path, count: int = 24) -> Path:
    """The first rows of the shipped narrow set; ragged in length."""
    lines = (REPO / "data/home_computing/train_bad.jsonl").read_text().splitlines()[:count]
    path.write_text("\n".join(lines) + "\n")
    return path


def toy_config(model_dir: Path, rows: Path, output_dir: Path) -> dict[str, Any]:
    """A stock torchtune config for the toy model: fp32, unshuffled, without defenses."""
    return {
        "output_dir": str(output_dir),
        "tokenizer": {
            "_component_": "emarecipes.models.hf_chat_tokenizer",
            "path": str(model_dir),
            "max_seq_len": 128,
        },
        "model": {
            "_component_": "torchtune.models.llama3_2.lora_llama3_2",
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "vocab_size": VOCABULARY,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "embed_dim": WIDTH,
            "intermediate_dim": MLP,
            "max_seq_len": 512,
            "norm_eps": 1e-5,
            "rope_base": 10000,
            "scale_factor": 1,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(model_dir),
            "checkpoint_files": ["model.safetensors"],
            "model_type": "LLAMA3_2",
            "output_dir": str(output_dir),
        },
        "resume_from_checkpoint": False,
        "dataset": {
            "_component_": "torchtune.datasets.chat_dataset",
            "source": "json",
            "data_files": str(rows),
            "conversation_column": "messages",
            "conversation_style": "openai",
            "split": "train",
        },
        "seed": 7,
        "shuffle": False,
        "batch_size": 4,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-2},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 2,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "epochs": 1,
        "max_steps_per_epoch": 5,
        "gradient_accumulation_steps": 1,
        "compile": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": str(output_dir / "logs"),
        },
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
        "device": "cpu",
        "dtype": "fp32",
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
    }


def with_variable(config: dict[str, Any]) -> dict[str, Any]:
    """The same config, with the model's folder in a variable of its own, as shipped ones have it.

    What a run writes of it must run again, although nothing there refers to the variable any more.
    """
    checkpointer = config["checkpointer"]
    return config | {
        "model_dir": checkpointer["checkpoint_dir"],
        "checkpointer": checkpointer | {"checkpoint_dir": "${model_dir}"},
    }


def write_config(path: Path, config: dict[str, Any]) -> Path:
    OmegaConf.save(OmegaConf.create(config), path)
    return path


def tune_run(
    config: Path,
    *overrides: str,
    processes: int = 0,
    recipe: str = "recipes/ema_lora.py",
    cwd: Path = REPO,
    cold: bool = False,
) -> subprocess.CompletedProcess[str]:
    """`tune run [--nproc_per_node N] recipe --config config overrides`; see `warm`."""
    launcher = ["--nproc_per_node", str(processes)] if processes else []
    command = [TUNE, "run", *launcher, recipe, "--config", str(config), *overrides]
    started = start(command, cwd, cold)
    stdout, stderr = started.communicate(timeout=300)
    assert started.returncode is not None
    return subprocess.CompletedProcess(command, started.returncode, stdout, stderr)


def start(
    command: list[str], cwd: Path = REPO, cold: bool = False, **environment: str
) -> "warm.Warm | subprocess.Popen[str]":
    """A `tune run` that goes on beside the test; see `warm`."""
    fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return warm.start(command, os.environ | fixed | environment, cwd, cold)


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a failed command tells its user: different lines, the last of which ends the output.

    On several processes a line is printed by its process, and again below the launcher's summary.
    """
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: "), done.stderr[-2000:]
    return list(dict.fromkeys(line for line in lines if line.startswith("error: ")))


def metrics(output_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
