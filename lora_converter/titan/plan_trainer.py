"""torchtitan's own trainer, one step of it, on fake tensors and a process group without other processes.

The model is built, converted, split, sharded and wrapped by the host on meta, as in a job. Then, where a job gives it
memory, fake tensors come in: they know the shapes and dtypes of CUDA's and lie on a fake CPU, since autograd on fake
CUDA tensors needs a CUDA build of torch.
"""

import dataclasses
import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import train_spec
from torchtitan.train import Trainer

from lora_converter.live_bytes import COMMUNICATION, LiveBytes
from lora_converter.packed_module import count_elements
from lora_converter.plan import ACTIVATIONS, BASE, BUFFERS, GRADIENTS, LOSS, OPTIMIZER, TRAINED, WORKING, Estimate
from lora_converter.titan.plan_stages import leave_alone
from lora_converter.titan.plan_stand_ins import Answers, CompiledLoss, stand_ins


def estimate(job_config: Any, *, gpus: int, rank: int = 0, as_on_cuda: bool = True) -> Estimate:
    """What a step of the job takes on one rank, a step that finds the optimizer's state.

    Args:
        job_config: Of a job that needs no file (see `plan.py`); its compile settings say what the loss is.
        gpus: Ranks of the job.
        rank: Whose memory.
        as_on_cuda: With CUDA's kernels; otherwise with this CPU's.
    """
    compiles = job_config.compile.enable and "loss" in job_config.compile.components
    job_config.compile.enable = False
    with _alone(gpus, rank), stand_ins(as_on_cuda=as_on_cuda), ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = LiveBytes(WORKING)
        trainer = _build(job_config, live, stack)
        trainer.tokenizer = SimpleNamespace(eos_id=0)  # for masks
        if compiles and as_on_cuda:
            _compile_loss(trainer)
        if trainer.parallel_dims.pp_enabled:
            leave_alone(trainer)
        return _Steps(trainer, live).run()


class _PlannedTrainer(Trainer):
    """torchtitan's, but for the index of its device, which fake tensors compare, and meshes made in time."""

    def init_distributed(self) -> ParallelDims:
        """Meshes hold numbers, so they are made before there are fake tensors."""
        self.device = torch.device("cpu")
        dims = super().init_distributed()
        dims.build_mesh()
        return dims


@contextmanager
def _alone(gpus: int, rank: int) -> Iterator[None]:
    """A process group of so many ranks, of which the others are not there."""
    ranks = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(gpus))
    before = {name: os.environ.get(name) for name in ranks}
    os.environ.update(ranks)
    dist.init_process_group("fake", rank=rank, world_size=gpus, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.enable()  # the trainer disables it
        gc.collect()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _build(job_config: Any, live: LiveBytes, stack: ExitStack) -> Trainer:
    """The trainer; fake tensors are in force from where it has parallelised the model on."""
    get_train_spec = train_spec.get_train_spec

    def planned(name: str) -> Any:
        spec = get_train_spec(name)

        def parallelised(*args: Any, **kwargs: Any) -> Any:
            model = spec.parallelize_fn(*args, **kwargs)
            enter()
            return model

        def pipelined(*args: Any, **kwargs: Any) -> Any:
            assert spec.pipelining_fn is not None
            args = tuple(spec.parallelize_fn if value is parallelised else value for value in args)
            result = spec.pipelining_fn(*args, **kwargs)
            enter()
            return result

        no_files = dict(build_tokenizer_fn=None, build_dataloader_fn=None, state_dict_adapter=None)
        return dataclasses.replace(spec, parallelize_fn=parallelised, pipelining_fn=pipelined, **no_files)

    def enter() -> None:
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), Answers(), live):
            stack.enter_context(mode)

    train_spec.get_train_spec = planned
    try:
        return _PlannedTrainer(job_config)
    finally:
        train_spec.get_train_spec = get_train_spec


def _compile_loss(trainer: Any) -> None:
    """Puts the stand-in of a compiled loss where torchtitan's own would be compiled."""

    def compiled(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if type(pred) is nn.Parameter or hasattr(pred, "placements"):  # logits under loss parallelism
            return cross_entropy_loss(pred, labels)
        return CompiledLoss.apply(pred, labels)

    if trainer.loss_fn is cross_entropy_loss:
        trainer.loss_fn = compiled
        if trainer.parallel_dims.pp_enabled:
            trainer.pp_schedule._loss_fn = compiled


class _Steps:
    """Runs a trainer's steps, and says which phase its work is in."""

    def __init__(self, trainer: Any, live: LiveBytes):
        self.trainer, self.live = trainer, live
        self.saved = 0
        for part in trainer.model_parts:
            self._watch(part)

    def _watch(self, part: nn.Module) -> None:
        part.register_forward_pre_hook(lambda *_: self._enter(ACTIVATIONS))
        head = getattr(part, "output", None)
        if head is None:
            part.register_forward_hook(lambda _, __, out: self._then(out, WORKING))
        else:
            head.register_forward_pre_hook(lambda _, inputs: self._at_head(inputs[0]))

    def _enter(self, phase: str) -> None:
        self.live.phase = phase

    def _then(self, tensor: torch.Tensor, phase: str) -> None:
        """Enters a phase once the tensor's gradient is there; until then, what is made after it is kept for it."""
        self.saved = max(self.saved, self.live.live[ACTIVATIONS])
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self._enter(phase))

    def _at_head(self, hidden: torch.Tensor) -> None:
        self._then(hidden, WORKING)
        self._enter(LOSS)

    def run(self) -> Estimate:
        trainer, live = self.trainer, self.live
        named = [named for part in trainer.model_parts for named in part.named_parameters()]
        trained = [param for _, param in named if param.requires_grad]
        frozen = [param for _, param in named if not param.requires_grad]
        sizes = {BASE: live.label(frozen, BASE), TRAINED: live.label(trained, TRAINED)}
        live.label([buffer for part in trainer.model_parts for buffer in part.buffers()], BUFFERS)
        trainer.optimizers.optimizers[0].register_step_pre_hook(lambda *_: self._enter(WORKING))
        for param in trained:
            param.grad = torch.zeros_like(param)
        trainer.optimizers.step()  # so that the step finds the optimizer's state
        sizes[GRADIENTS] = live.label([cast(torch.Tensor, param.grad) for param in trained], GRADIENTS)
        states = [state for optimizer in trainer.optimizers.optimizers for state in optimizer.state.values()]
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        sizes[OPTIMIZER] = live.label(tensors, OPTIMIZER)
        trainer.optimizers.zero_grad()
        dims = trainer.parallel_dims
        buckets = trained if dims.dp_replicate_enabled and not dims.fsdp_enabled else []
        buckets = [torch.empty_like(param) for param in buckets]  # of DDP, which keeps them
        live.label(buckets, COMMUNICATION)
        live.restart()
        trainer.step = 2  # the first one logs
        trainer.train_step(self._batches())
        return Estimate(
            trained=sum(p.numel() for p in trained),
            frozen=sum(
                count_elements(part, [p for p in part.parameters() if not p.requires_grad])
                for part in trainer.model_parts
            ),
            sizes=sizes,
            saved=self.saved,
            most=dict(live.most),
            at_peak=dict(live.peak),
        )

    def _batches(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        training = self.trainer.job_config.training
        while True:
            tokens = torch.zeros(training.local_batch_size, training.seq_len, dtype=torch.int64)
            yield {"input": tokens}, torch.zeros_like(tokens)
