"""Random adapters, made and saved by PEFT itself, on random bases: what people bring.

    python tests/tools/adapter_zoo.py [--count 200] [--seed 0]

For each, the right result is PEFT's own: the base in transformers, the adapter loaded and merged by PEFT. Ours must be
the same to 1e-5, merged offline and loaded into a live model, or refused by an error that names the field or the key.
"""

import argparse
import json
import logging
import math
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lora_converter import LoRAConfig, adapter_configs, apply_lora
from lora_converter.hf.saved_modules import is_saved, modules_of_keys
from lora_converter.linear import linears_of
from lora_converter.merge import merge_directories
from lora_converter.new_tokens import token_rows
from lora_converter.peft import CONFIG_FILE, WEIGHTS_FILE, PeftAdapter, from_model, into_model, load_peft, save_peft

SIZES = {"vocab_size": 96, "max_position_embeddings": 64}
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **SIZES)
QKVO, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]

TOKENS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Base:
    """A shape of model, and the linears that an adapter may target there."""

    config: Callable[[bool], Any]
    """Of whether its head is tied."""
    linears: list[str]
    transposed: bool = False


BASES = {
    # GPT-2's c_proj is square at width 32, so that no shape tells its orientation.
    "gpt2": Base(
        lambda tied: GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=96, tie_word_embeddings=tied
        ),
        ["c_attn", "c_proj", "c_fc"],
        transposed=True,
    ),
    "llama": Base(lambda tied: LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=tied), QKVO + MLP),
    "mistral": Base(lambda tied: MistralConfig(**TEXT, num_key_value_heads=4, tie_word_embeddings=tied), QKVO + MLP),
    "qwen2": Base(lambda tied: Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=tied), QKVO + MLP),
    "qwen3": Base(
        lambda tied: Qwen3Config(**TEXT, head_dim=8, num_key_value_heads=4, tie_word_embeddings=tied), QKVO + MLP
    ),
    "deepseek_v3": Base(
        lambda tied: DeepseekV3Config(
            **TEXT, tie_word_embeddings=tied, first_k_dense_replace=2, n_routed_experts=4, n_group=1, topk_group=1,
            num_experts_per_tok=2, moe_intermediate_size=24, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=4, v_head_dim=8, num_key_value_heads=4,
        ),
        MLA,
    ),
}  # fmt: skip

HARMLESS_INITS = [True, False, "gaussian", "orthogonal", "mica"]
CHANGED_BASE_INITS = ["pissa", "pissa_niter_4", "olora"]
"""Of which the randomised one cannot be computed again."""


@dataclass
class Specimen:
    """One adapter on its base.

    Attributes:
        refusable: Words of which one must be in our error, if we refuse it. Empty: it must be read.
    """

    name: str
    base: Path
    adapter: Path
    traits: list[str] = field(default_factory=list)
    refusable: list[str] = field(default_factory=list)


def make_specimen(number: int, folder: Path, rng: random.Random) -> Specimen:
    """Makes a base, and an adapter on it through PEFT, and gives both what files from elsewhere have."""
    kind = rng.choice(list(BASES))
    shape, tied = BASES[kind], rng.random() < 0.4
    found = Specimen(kind, folder / "base", folder / "adapter", [kind] + ["tied"] * tied)
    torch.manual_seed(number)
    model = AutoModelForCausalLM.from_config(shape.config(tied)).to(
        rng.choice([torch.float32, torch.float32, torch.bfloat16])
    )
    _randomise(model, 0.15)
    model.save_pretrained(found.base, max_shard_size=rng.choice(["1GB", "20KB"]))
    options = _options(shape, tied, rng, found)
    resizes = "resized vocabulary" in found.traits
    if resizes:
        model.resize_token_embeddings(104)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.config._name_or_path = model.name_or_path = str(found.base)
        peft_model = get_peft_model(model, LoraConfig(**options))
        _randomise_adapter(peft_model)
        save_embeddings = rng.choice([True, "auto"]) if "lm_head" in options["target_modules"] else "auto"
        peft_model.save_pretrained(found.adapter, save_embedding_layers=True if resizes else save_embeddings)
    _estrange(found, shape, rng)
    return found


def _options(shape: Base, tied: bool, rng: random.Random, found: Specimen) -> dict[str, Any]:
    targets = rng.sample(shape.linears, rng.randint(1, len(shape.linears)))
    options: dict[str, Any] = {
        "r": rng.choice([2, 4]),
        "lora_alpha": rng.choice([4, 8, 6]),
        "use_rslora": rng.random() < 0.3,
        "fan_in_fan_out": shape.transposed,
        "init_lora_weights": rng.choice(HARMLESS_INITS if not shape.transposed else [True, False, "gaussian"]),
        "target_modules": targets,
    }

    def sometimes(chance: float, trait: str, refusable: list[str] | None = None, **more: Any) -> None:
        if rng.random() < chance:
            options.update(more)
            found.traits.append(trait)
            found.refusable += refusable or []

    first = targets[0]
    sometimes(0.3, "rank_pattern", rank_pattern={first: 6, rf"layers\.1\..*{first}": 8})
    sometimes(0.3, "alpha_pattern", alpha_pattern={rf".*\.0\..*{first}": 3, first: 20})
    sometimes(0.25, "lm_head", target_modules=[*targets, "lm_head"])
    if "lm_head" not in options["target_modules"]:
        sometimes(0.1, "regular expression", target_modules=rf".*\.({'|'.join(targets)})$")
        sometimes(0.1, "resized vocabulary")
    if not shape.transposed:
        if options["target_modules"] is targets and "resized vocabulary" not in found.traits:
            init = rng.choice(CHANGED_BASE_INITS)
            refused = ["init_lora_weights"] * (init == "pissa_niter_4" or "lm_head" in targets)
            sometimes(0.1, "changed base", refused, init_lora_weights=init)
        if "changed base" not in found.traits:
            sometimes(0.08, "DoRA", use_dora=True, init_lora_weights=True)
    sometimes(0.08, "bias", ["bias"], bias="lora_only")
    sometimes(0.05, "lora_bias", ["lora_bias"], lora_bias=True, init_lora_weights=True)
    sometimes(0.06, "modules_to_save", modules_to_save=["norm" if not shape.transposed else "ln_f"])
    if "resized vocabulary" not in found.traits and "lm_head" not in options["target_modules"]:
        sometimes(0.06, "trainable tokens", trainable_token_indices=[2, 1])
    if "DoRA" in found.traits and "lora_bias" in found.refusable:
        options.pop("lora_bias")
        found.refusable.remove("lora_bias")
    return options


def _randomise(model: PreTrainedModel, scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param.copy_(torch.randn(param.shape, generator=generator) * scale)


def _randomise_adapter(model: PeftModel) -> None:
    """Trains, as far as it matters: every factor moves from where it began."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name or param.requires_grad:
                param.add_(torch.randn(param.shape, generator=generator).to(param.dtype) * 0.1)


def _estrange(found: Specimen, shape: Base, rng: random.Random) -> None:
    """What other programs and hubs do to the files."""

    def sometimes(chance: float, trait: str) -> bool:
        hit = rng.random() < chance
        found.traits += [trait] * hit
        return hit

    path, config_path = found.adapter / WEIGHTS_FILE, found.adapter / CONFIG_FILE
    tensors, config = load_file(path), json.loads(config_path.read_text())
    if sometimes(0.2, ".default. keys"):
        tensors = {k.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): v
                   for k, v in tensors.items()}  # fmt: skip
    if sometimes(0.2, "bf16 factors"):
        tensors = {key: value.bfloat16() if ".lora_" in key else value for key, value in tensors.items()}
    if sometimes(0.3, "wrong fan_in_fan_out"):
        config["fan_in_fan_out"] = not shape.transposed
    if sometimes(0.2, "fields left out"):
        for name in ("lora_dropout", "bias", "peft_version", "task_type", "eva_config"):
            if config.get(name) in (None, "none", 0.0) or name == "peft_version":
                config.pop(name, None)
    if sometimes(0.15, "a new field that is off"):
        config["use_something_new"] = rng.choice([None, False, {}])
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"})
    config_path.write_text(json.dumps(config))
    if sometimes(0.3, "other files in the base"):
        save_file({"stray.weight": torch.ones(2, 2)}, found.base / "consolidated.safetensors")
        (found.base / "original").mkdir()
        (found.base / "original" / "params.json").write_text("{}")
        (found.base / "pytorch_model.bin").write_bytes(b"not read")
    if (found.base / "model.safetensors").exists() and found.name == "gpt2" and sometimes(0.5, "hub's names"):
        weights = load_file(found.base / "model.safetensors")
        renamed = {key.removeprefix("transformer."): value for key, value in weights.items()}
        save_file(renamed, found.base / "model.safetensors", metadata={"format": "pt"})


def logits(model: torch.nn.Module) -> torch.Tensor:
    """In fp64, so that what differs is the weights: merged ones are rounded once, to fp32."""
    with torch.no_grad():
        return model.double().eval()(input_ids=TOKENS).logits


def read_base(specimen: Specimen) -> PreTrainedModel:
    """In fp32, so that what is compared is not the rounding of bf16."""
    return AutoModelForCausalLM.from_pretrained(specimen.base, dtype=torch.float32)


def right_logits(specimen: Specimen) -> torch.Tensor:
    """PEFT's own result. Its loader wants keys without the adapter's name."""
    cleaned = specimen.adapter.with_name("cleaned")
    shutil.copytree(specimen.adapter, cleaned)
    tensors = {key.replace(".default.", "."): value for key, value in load_file(cleaned / WEIGHTS_FILE).items()}
    save_file(tensors, cleaned / WEIGHTS_FILE, metadata={"format": "pt"})
    config = json.loads((cleaned / CONFIG_FILE).read_text())
    config.pop("use_something_new", None)
    (cleaned / CONFIG_FILE).write_text(json.dumps(config))
    model = read_base(specimen)
    if "resized vocabulary" in specimen.traits:
        model.resize_token_embeddings(104)
    adapted = PeftModel.from_pretrained(model, cleaned)
    if {"tied", "lm_head"} <= {*specimen.traits}:  # merged by PEFT, a tied head changes the embedding too
        return logits(adapted)
    return logits(adapted.merge_and_unload())


def peft_cannot_read(specimen: Specimen) -> bool:
    try:
        right_logits(specimen)
    except RuntimeError as error:
        return "size mismatch" in str(error)
    return False


def merged_logits(specimen: Specimen, folder: Path) -> torch.Tensor:
    merge_directories(specimen.base, specimen.adapter, folder / "merged", dtype=torch.float32)
    return logits(AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32))


def live_logits(specimen: Specimen) -> torch.Tensor:
    adapter, model = load_peft(specimen.adapter), read_base(specimen)
    give_adapter(model, adapter)
    return logits(model)


def give_adapter(model: PreTrainedModel, adapter: PeftAdapter) -> None:
    """Adapters on the same linears with the same ranks and alphas, and the values."""
    ours = linears_of(model)
    config = LoRAConfig(
        rank=adapter.rank, alpha=adapter.alpha, use_rslora=adapter.use_rslora, target_modules=list(adapter.factors),
        rank_pattern={m: adapter.rank_of(m) for m in adapter.factors if adapter.rank_of(m) != adapter.rank},
        alpha_pattern=dict(adapter.alphas), use_dora=bool(adapter.magnitudes), init=adapter.init,
        train_also=modules_of_keys(key for key in adapter.base_weights if is_saved(key, adapter.modules_to_save)),
    )  # fmt: skip
    assert adapter.factors.keys() <= ours.keys()
    tokens = sorted({token for rows in adapter.token_rows.values() for token in rows.ids})
    apply_lora(model, config, tokens=tokens)
    into_model(adapter, model)
    of_tokens = {module.lora_fqn for module in token_rows(model).values()}
    assert adapter_configs(model).keys() == {*adapter.factors, *of_tokens} and bool(tokens) is bool(of_tokens)


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def check(specimen: Specimen, folder: Path) -> str:
    """ "right" or "refused"; anything else raises."""
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "merged": lambda: merged_logits(specimen, folder),
        "live": lambda: live_logits(specimen),
    }
    right, outcomes = None, set()
    for way, make in ways.items():
        try:
            found = make()
        except ValueError as error:
            if "rank_pattern that gives it" in str(error):  # PEFT sorts the keys it writes: it cannot read this either
                assert peft_cannot_read(specimen)
                return "refused"
            named = [word for word in [*specimen.refusable, "brings"] if word in str(error)]
            assert named, f"{way}: refused without naming what is refused: {error}"
            assert "brings" not in named or way == "live", error
            outcomes.add("refused" if "brings" not in named else "refused live")
            continue
        assert not specimen.refusable, f"{way}: {specimen.refusable} was read"
        right = right_logits(specimen) if right is None else right
        if found.shape == right.shape:
            assert relative(found, right) < 1e-5, f"{way}: off by {relative(found, right):.2e}"
        else:
            raise AssertionError(f"{way}: logits are {found.shape}, PEFT's {right.shape}")
        outcomes.add("right")
    if "right" in outcomes and "refused live" not in outcomes:
        check_round_trip(specimen, folder)
    return "refused" if outcomes == {"refused"} else "right"


def check_round_trip(specimen: Specimen, folder: Path) -> None:
    """Out of a live model and read back: bit for bit the factors that went in, with their ranks and scalings.

    What belonged to a changed base comes out plain, of twice the rank: its A above what that has moved by.
    """
    adapter, model = load_peft(specimen.adapter), read_base(specimen)
    give_adapter(model, adapter)
    save_peft(from_model(model), folder / "again")
    again = load_peft(folder / "again")
    assert again.factors.keys() == adapter.factors.keys()
    for module, pair in adapter.factors.items():
        found = again.factors[module]
        if adapter.init:
            assert torch.equal(pair[0].float(), found[0].chunk(2)[0]), module
            assert math.isclose(adapter.scaling_of(module), again.scaling_of(module)), module
            continue
        assert all(torch.equal(a.float(), b) for a, b in zip(pair, found, strict=True)), module
        assert adapter.scaling_of(module) == again.scaling_of(module), module


def run(count: int, seed: int, folder: Path) -> Counter[str]:
    """Makes and checks; counts outcomes and traits."""
    transformers.utils.logging.set_verbosity_error()
    counts: Counter[str] = Counter()
    for number in range(count):
        rng, here = random.Random(f"{seed}:{number}"), folder / f"{number}"
        here.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            specimen = make_specimen(number, here, rng)
            try:
                outcome = check(specimen, here)
            except Exception as error:
                raise AssertionError(
                    f"specimen {number} of seed {seed} ({', '.join(specimen.traits)}): {error!r}"
                ) from error
        counts.update([outcome, *specimen.traits])
        shutil.rmtree(here)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("lora_converter").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        for name, count in run(options.count, options.seed, Path(folder)).most_common():
            print(f"{count:5d}  {name}")


if __name__ == "__main__":
    main()
