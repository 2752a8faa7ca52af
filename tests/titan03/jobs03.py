"""Runs torchtitan 0.3's own trainer in this process, many times over one process group, and records what it does."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from lora_converter.titan03.cpu_changes import install

install()  # before torchtitan

import torch
import torch.distributed as dist
from batches import ROWS, SEQ_LEN, global_batch
from torch.distributed.tensor.debug import _clear_fast_path_sharding_prop_cache, _clear_python_sharding_prop_cache
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.configs import DebugConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models import deepseek_v3, llama3, qwen3
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from lora_converter.adapted import adapter_parameters
from lora_converter.names import stable_hash
from lora_converter.tensors import copy_full_, full_tensor
from lora_converter.titan03 import lora
from lora_converter.titan03.names import canonical_name

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "tests" / "assets"
BACKENDS = ("spmd_types", "partial_dtensor")
STEPS = 10

# Unequal everywhere, as in `harness.py`: kv heads != heads, hidden != 4 dim, vocab != dim.
DIM, LAYERS, HEADS, KV_HEADS, VOCABULARY, HIDDEN = 64, 4, 4, 2, 320, 192


def _ends(inits: Any) -> dict[str, Any]:
    """The parts of a model's config that are not layers."""
    norm = RMSNorm.Config(normalized_shape=DIM, eps=getattr(inits, "_EPS", 1e-5), param_init=inits._NORM_INIT)
    embedding = dict(num_embeddings=VOCABULARY, embedding_dim=DIM, param_init=inits._EMBEDDING_INIT)
    head = Linear.Config(in_features=DIM, out_features=VOCABULARY, param_init=inits._LINEAR_INIT)
    return dict(dim=DIM, vocab_size=VOCABULARY, norm=norm, tok_embeddings=Embedding.Config(**embedding), lm_head=head)


def _llama3() -> Any:
    rope = ComplexRoPE.Config(dim=DIM // HEADS, max_seq_len=1024, theta=500000, scaling="llama")
    sizes = dict(n_layers=LAYERS, dim=DIM, n_heads=HEADS, n_kv_heads=KV_HEADS, hidden_dim=HIDDEN)
    layers = llama3._build_llama3_layers(**sizes, rope=rope, attn_backend="flex")
    return llama3.Llama3Model.Config(**_ends(llama3), layers=layers)


def _qwen3() -> Any:
    rope = CosSinRoPE.Config(dim=24, max_seq_len=1024, theta=1e6)
    sizes = dict(n_layers=3, dim=DIM, n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=24, hidden_dim=160)
    layers = qwen3._build_qwen3_layers(**sizes, rope=rope, attn_backend="flex")
    return qwen3.Qwen3Model.Config(**_ends(qwen3), layers=layers)


def _decided(layers: list[Any]) -> list[Any]:
    """Layers whose routers are decided: of scores that are nearly the same a rounding would choose other experts."""
    for layer in layers:
        if layer.moe is not None:
            layer.moe.router.gate.param_init = {"weight": functools.partial(torch.nn.init.normal_, std=0.5)}
    return layers


def _qwen3_moe() -> Any:
    rope = CosSinRoPE.Config(dim=24, max_seq_len=1024, theta=1e6)
    sizes = dict(n_layers=3, dim=DIM, n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=24, moe_hidden_dim=48)
    experts = dict(num_experts=4, top_k=2, moe_comm_backend="standard")
    layers = qwen3._build_qwen3_moe_layers(**sizes, **experts, rope=rope, attn_backend="flex")
    return qwen3.Qwen3Model.Config(**_ends(qwen3), layers=_decided(layers))


def _deepseek_v3() -> Any:
    """A dense layer, then two of routed experts and a shared one."""
    rope = ComplexRoPE.Config(dim=8, max_seq_len=1024, theta=10000.0)
    sizes = dict(n_layers=3, n_dense_layers=1, dim=DIM, n_heads=HEADS, dense_hidden_dim=160, moe_hidden_dim=48)
    ranks = dict(q_lora_rank=24, kv_lora_rank=40, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, mscale=1.0)
    experts = dict(num_experts=4, num_shared_experts=1, router_top_k=2, router_score_func="sigmoid")
    sent = dict(router_route_norm=True, moe_comm_backend="standard", non_blocking_capacity_factor=None)
    layers = deepseek_v3._build_dsv3_layers(**sizes, **ranks, **experts, **sent, rope=rope, attn_backend="flex")
    return deepseek_v3.DeepSeekV3Model.Config(**_ends(deepseek_v3), layers=_decided(layers), mtp_layers=[])


MODELS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "llama3": (llama3, _llama3),
    "qwen3": (qwen3, _qwen3),
    "qwen3_moe": (qwen3, _qwen3_moe),
    "deepseek_v3": (deepseek_v3, _deepseek_v3),
}


def spec_of(model: str) -> ModelSpec:
    """torchtitan's, of a tiny model."""
    module, make = MODELS[model]
    return dataclasses.replace(module.model_registry("debugmodel", attn_backend="flex"), model=make(), flavor="tiny")


@dataclass
class Run:
    """One training run: what was logged at each step, and the trainer as it ended."""

    trainer: Trainer
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    initial: dict[str, torch.Tensor] = field(default_factory=dict)


def host_config(folder: Path | str, *, model: str = "llama3", lr: float = 3e-3, **options: Any) -> Trainer.Config:
    """A job without adapters, dumped under `folder`.

    Args:
        options: `section__option` -> value.
    """
    spec = spec_of(model)
    optimizer = default_adamw(lr=lr, eps=1e-5)
    optimizer.implementation = "foreach"
    cross_entropy = CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)
    config = Trainer.Config(
        model_spec=spec,
        loss=ChunkedLossWrapper.Config(loss_fn=cross_entropy),
        hf_assets_path=str(ASSETS / "tokenizer"),
        dump_folder=str(folder),
        optimizer=optimizer,
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=ROWS,
            seq_len=SEQ_LEN,
            steps=STEPS,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4_test", dataset_path=str(ASSETS / "c4_test")),
        parallelism=ParallelismConfig(pipeline_parallel_schedule="1F1B", pipeline_parallel_microbatch_size=2),
        checkpoint=CheckpointManager.Config(enable=True, interval=1000, last_save_model_only=False),
        metrics=MetricsProcessor.Config(log_freq=1),
        debug=DebugConfig(seed=11, enable_structured_logging=False),
        activation_checkpoint=None,
    )
    for option, value in options.items():
        *sections, name = option.split("__")
        owner: Any = config
        for section in sections:
            owner = getattr(owner, section)
        assert hasattr(owner, name), option
        setattr(owner, name, value)
    return config


def config(folder: Path | str, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """The same job, with adapters; `settings` are those of `[lora]`."""
    return lora(host_config(folder, **options), **{"rank": 4, **(settings or {})})


def start_process_group() -> None:
    """A gloo group from torchrun's environment, or of this process alone; what torchtitan does beside it."""
    torch.autograd.set_multithreading_enabled(False)
    if not dist.is_initialized():
        for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1").items():
            os.environ.setdefault(name, value)
        alone = os.environ["WORLD_SIZE"] == "1"
        store = dist.HashStore() if alone else None
        dist.init_process_group("gloo", store=store, rank=0 if alone else -1, world_size=1 if alone else -1)


def build(config: Any) -> Run:
    """A trainer that records; `finish()` it, or look at it as it is before the first step."""
    start_process_group()
    # What DTensor knows of a mesh, by what it spans, it says of the next run's, too.
    _clear_python_sharding_prop_cache()
    _clear_fast_path_sharding_prop_cache()
    config.__post_init__()
    run = Run(config.build())
    log = run.trainer.metrics_processor.log

    def record(step: int, loss: float, max_loss: float, grad_norm: float, **kwargs: Any) -> None:
        run.losses.append(float(loss))
        run.grad_norms.append(float(grad_norm))
        log(step, loss, max_loss, grad_norm, **kwargs)

    run.trainer.metrics_processor.log = record  # type: ignore[method-assign]
    return run


def finish(run: Run) -> Run:
    """Loads what there is, trains to the end and closes. The trainer's sleep for other ranks' sake is left out."""
    with mock.patch("torchtitan.trainer.time.sleep"):
        run.trainer.train()
    run.trainer.close()
    return run


def train(config: Any) -> Run:
    """Builds, trains to the end and closes."""
    return finish(build(config))


def feed_global_batches(run: Run) -> None:
    """Every layout reads the same rows at each step: ranks and micro-batches split one global batch."""
    trainer: Any = run.trainer
    mesh = trainer.parallel_dims.get_optional_mesh("batch")
    rank, degree = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
    parts = trainer.gradient_accumulation_steps * trainer.num_pipeline_parallel_microbatches
    rows = ROWS // degree // parts

    def batches() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for step in itertools.count(trainer.step):
            tokens = global_batch(step)
            for part in range(parts):
                own = tokens[(rank * parts + part) * rows :][:rows]
                positions = torch.arange(SEQ_LEN).expand(rows, -1).contiguous()
                yield {"input": own[:, :-1].contiguous(), "positions": positions}, own[:, 1:].contiguous()

    generate = trainer.batch_generator
    trainer.batch_generator = lambda _: generate(batches())


def fill_b_when_loaded(run: Run) -> None:
    """B away from zero, so that every adapter has a gradient; also notes the adapters as they began."""
    load = run.trainer.checkpointer.load

    def load_and_fill(step: int = -1) -> bool:
        loaded = load(step)
        if run.trainer.step == 0:
            run.initial = whole_adapter(run)
            for part in run.trainer.model_parts:
                for name, param in adapter_parameters(part).items():
                    if name.endswith(("lora_b.weight", "_lora_b")):
                        generator = torch.Generator().manual_seed(stable_hash(canonical_name(name)))
                        copy_full_(param, torch.empty(param.shape).normal_(std=0.05, generator=generator))
        return loaded

    run.trainer.checkpointer.load = load_and_fill  # type: ignore[method-assign]


def adapter_state(run: Run) -> dict[str, torch.Tensor]:
    """This rank's adapters as full tensors, copied, by canonical names."""
    state = run.trainer.checkpointer.run.model.adapters.state_dict()
    return {canonical_name(name): full_tensor(value).clone() for name, value in state.items()}


def whole_adapter(run: Run) -> dict[str, torch.Tensor]:
    """The adapters of all pipeline stages, as full tensors, on every rank."""
    gathered: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, adapter_state(run))
    return {name: value for part in gathered for name, value in part.items()}


def losses_of(run: Run) -> list[float]:
    """Under PP the last stage alone knows the loss; the others log -1."""
    losses = torch.tensor(run.losses, dtype=torch.float64)
    dist.all_reduce(losses, op=dist.ReduceOp.MAX)
    return losses.tolist()


def trained_tensors(run: Run) -> int:
    """How many tensors the optimizers of this rank have."""
    return sum(len(g["params"]) for o in run.trainer.optimizers.optimizers for g in o.param_groups)
