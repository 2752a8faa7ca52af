"""The main job on real text that every machine has, with no download, in some minutes on 2 CPU cores.

1. A small Llama learns Python from the standard library's own sources and is saved as a Hugging Face folder.
2. Low-rank adapters teach it C++ from the headers inside the installed torch: configs/debug_lora.toml on 2 ranks.
3. The run is resumed once from its middle checkpoint, and must repeat its second half.
4. The untouched base and full fine-tuning read the same text, for scale.
5. Other adapters on the same base learn to answer, from 2,000 conversations; transformers and PEFT ask them.

Everything lies under outputs/demo; the picture is outputs/demo/loss.png.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import torch
from demo_chat import describe_scores, write_conversations
from losses import read_losses
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "outputs" / "demo"
RANKS = min(2, torch.accelerator.device_count()) if torch.accelerator.is_available() else 2
VOCAB = 2048  # of torchtitan's llama3 debugmodel
COMMON = (
    f"--model.hf_assets_path={OUT}/base",
    "--training.seq_len=128",
    "--metrics.enable_tensorboard",
    "--metrics.disable_color_printing",
    "--debug.seed=0",
)
CHAT = (
    "--training.dataset=chat",
    f"--training.dataset_path={OUT}/conversations.jsonl",
    "--training.local_batch_size=4",
    f"--checkpoint.initial_load_path={OUT}/base",
    "--checkpoint.initial_load_in_hf",
    "--checkpoint.last_save_in_hf",
    "--checkpoint.last_save_model_only",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the steps: shows that it runs, not that it learns"
    )
    tenth = 10 if parser.parse_args().quick else 1
    base_steps, steps, chat_steps = 240 // tenth, 80 // tenth, 300 // tenth
    began = time.monotonic()

    shutil.rmtree(OUT, ignore_errors=True)
    python = write_text(OUT / "python", Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    cpp = write_text(OUT / "cpp", Path(torch.__file__).parent.glob("include/c10/**/*.h"))
    write_tokenizer(OUT / "base", OUT / "python")

    say(f"1/6  A small Llama learns Python from {python:.1f} MB of the standard library, {base_steps} steps")
    train("pretrain", "debug_base", f"--training.steps={base_steps}", f"--training.dataset_path={OUT}/python",
          "--checkpoint.last_save_in_hf", "--lr_scheduler.warmup_steps=10")  # fmt: skip
    save_as_hugging_face(OUT / "pretrain" / "checkpoint" / f"step-{base_steps}", OUT / "base")

    text = (
        f"--training.steps={steps}",
        f"--training.dataset_path={OUT}/cpp",
        "--training.local_batch_size=4",
        f"--checkpoint.initial_load_path={OUT}/base",
        "--checkpoint.initial_load_in_hf",
        f"--checkpoint.interval={steps // 2}",
        "--checkpoint.no-last_save_model_only",
    )
    say(f"2/6  Adapters learn C++ from {cpp:.1f} MB of torch's headers, {steps} steps")
    train("lora", "debug_lora", *text)
    say(f"3/6  The same run, resumed from step {steps // 2}")
    shutil.copytree(OUT / "lora" / "checkpoint", OUT / "resumed" / "checkpoint")
    train("resumed", "debug_lora", *text, f"--checkpoint.load_step={steps // 2}", "--checkpoint.load_only")
    say("4/6  The untouched base reads the same text (learning rate 0)")
    train("untouched", "debug_lora", *text, "--optimizer.lr=0", "--checkpoint.load_only")
    say("5/6  Full fine-tuning, for scale")
    train("full", "debug_base", *text, "--optimizer.lr=1e-3")

    say(f"6/6  Adapters learn to answer from 2,000 conversations, {chat_steps} steps")
    asked = write_conversations(OUT / "conversations.jsonl", OUT / "base")
    train("chat", "debug_lora", *CHAT, f"--training.steps={chat_steps}", ranks=1)
    scores = describe_scores(OUT / "base", OUT / "chat" / "checkpoint" / f"step-{chat_steps}", asked)

    losses = {name: read_losses(OUT / name) for name in ("untouched", "lora", "full", "resumed", "chat")}
    draw(losses)
    summarise(losses, steps, scores, time.monotonic() - began)


def say(line: str) -> None:
    print(f"\n== {line}", flush=True)


def write_text(folder: Path, files: Iterable[Path], limit: float = 4e6, lines: int = 60) -> float:
    """Pieces of source files, shuffled, as torchtitan's `c4_test` data set reads them. Returns megabytes of text."""
    pieces = []
    for file in sorted(files):
        text = file.read_text(errors="ignore").splitlines(keepends=True)
        pieces += ["".join(text[start : start + lines]) for start in range(0, len(text), lines)]
    random.Random(0).shuffle(pieces)
    folder.mkdir(parents=True)
    size = 0
    with open(folder / "data.jsonl", "w") as out:
        for piece in pieces:
            size += len(piece)
            out.write(json.dumps({"text": piece}) + "\n")
            if size > limit:
                break
    return size / 1e6


def write_tokenizer(folder: Path, text: Path) -> None:
    """A byte-level BPE of 2,048 tokens, learnt from the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    documents = [json.loads(line)["text"] for line in (text / "data.jsonl").read_text().splitlines()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents[::4], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def train(name: str, config: str, *options: str, ranks: int = RANKS) -> None:
    """One torchrun of the README's command, its log in outputs/demo/<name>.log and every tenth step on the screen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
               "-m", "lora_converter.train", f"--job.config_file={ROOT}/configs/{config}.toml",
               f"--job.dump_folder={OUT / name}", *COMMON, *options]  # fmt: skip
    env = dict(
        os.environ,
        OMP_NUM_THREADS=str(2 // ranks),
        LOG_RANK="0",
        HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(OUT / "cache"),
    )
    log = OUT / f"{name}.log"
    with (
        open(log, "w") as file,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run,
    ):
        assert run.stdout is not None
        shown = set()  # every rank logs; one of them is enough
        for line in run.stdout:
            file.write(line)
            message = line.rstrip().rpartition(" - ")[2]
            step = int(message.split()[1]) if message.startswith("step:") else 0
            wanted = step == 1 or step % 10 == 0 if step else message.startswith(("LoRA:", "Chat:"))
            if wanted and (step or message) not in shown:
                shown.add(step or message)
                print(f"   {message}", flush=True)
    if run.returncode:
        sys.exit(f"{' '.join(command)}\nfailed, see {log}:\n{''.join(log.read_text().splitlines(True)[-30:])}")


def save_as_hugging_face(step: Path, folder: Path) -> None:
    """Puts the weights that torchtitan wrote in Hugging Face's names beside the tokenizer, with a config.json."""
    shutil.move(step / "model-00001-of-00001.safetensors", folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def draw(losses: dict[str, dict[int, float]]) -> None:
    figure, (axes, chat) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(2, 1))
    styles = {
        "untouched": ("untouched base", "tab:gray", "-"),
        "full": ("full fine-tuning, all weights", "tab:orange", "-"),
        "lora": ("LoRA, rank 16", "tab:blue", "-"),
        "resumed": ("LoRA, resumed from the middle", "black", ":"),
    }
    for name, (label, color, line) in styles.items():
        axes.plot(list(losses[name]), list(losses[name].values()), line, color=color, label=label)
    axes.set(xlabel="step", ylabel="loss on C++ headers (nats per token)", title="A model of Python learns C++")
    axes.grid(alpha=0.3)
    axes.legend()
    chat.plot(list(losses["chat"]), list(losses["chat"].values()), color="tab:blue")
    chat.set(xlabel="step", ylabel="loss on answers (nats per token)", title="It learns to answer")
    chat.grid(alpha=0.3)
    figure.savefig(OUT / "loss.png", dpi=120)


def summarise(losses: dict[str, dict[int, float]], steps: int, scores: str, seconds: float) -> None:
    def mean(name: str, last: int) -> float:
        window = [loss for step, loss in losses[name].items() if last - steps // 8 < step <= last]
        return sum(window) / len(window)

    def size(run: str) -> str:
        files = (OUT / run / "checkpoint" / f"step-{steps}").iterdir()
        return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"

    drift = max(abs(loss - losses["lora"][step]) for step, loss in losses["resumed"].items())
    counts = next(line for line in (OUT / "lora.log").read_text().splitlines() if "linears adapted" in line)
    print(
        f"""
Trained          {counts.rpartition(" - ")[2]}
Loss on C++      untouched base {mean("untouched", steps):.3f}   LoRA {mean("lora", steps):.3f}   \
full fine-tuning {mean("full", steps):.3f}   (mean of the last {steps // 8} of {steps} steps)
                 step 1: LoRA {losses["lora"][1]:.3f}, untouched base {losses["untouched"][1]:.3f}
Resumed          from step {steps // 2}; largest difference of a loss to the uninterrupted run: {drift:g}
Step checkpoint  adapters {size("lora")}   all weights {size("full")}   (both with optimizer state)
Chat             {scores}

Base             {OUT.relative_to(ROOT)}/base                  Hugging Face folder
Adapters         {OUT.relative_to(ROOT)}/lora/checkpoint       step folders (DCP)
Chat adapters    {OUT.relative_to(ROOT)}/chat/checkpoint       PEFT directory
Loss curves      {OUT.relative_to(ROOT)}/loss.png
Logs             {OUT.relative_to(ROOT)}/*.log
Time             {seconds / 60:.1f} minutes"""
    )


if __name__ == "__main__":
    main()
