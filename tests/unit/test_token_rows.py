"""Rows of tokens that train beside adapters: values, gradients and merges are those of PEFT's own module."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from hf_tiny import tiny_llama, tiny_qwen3
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_converter import (
    LoRAConfig,
    adapter_parameters,
    apply_lora,
    disable_adapter,
    merge_adapter,
    merge_and_unload,
    unload_adapter,
    unmerge_adapter,
)
from lora_converter.new_tokens import token_rows
from lora_converter.sync import AdapterReceiver, IncrementReceiver, pack
from lora_converter.token_rows import ROWS
from lora_converter.vocabulary import mean_rows

IDS = [7, 319, 320, 322]  # of a base of 320 rows: two of its own, two new ones, and one between that does not train
TEXT = torch.tensor([[7, 3, 320, 319, 322, 5, 7, 1], [2, 322, 9, 7, 7, 4, 319, 6]])


def ours(model: nn.Module) -> nn.Module:
    apply_lora(model, LoRAConfig(rank=4, target_modules=["q_proj"]), seed=3, tokens=IDS)
    return model


def loss_of(model: nn.Module) -> torch.Tensor:
    logits = model(TEXT).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten())


@pytest.fixture(params=["untied", "tied"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Our model and PEFT's, resized by transformers, with one and the same values away from where they begin."""
    make = tiny_llama if request.param == "untied" else lambda: tiny_qwen3(tied=True)
    mine, theirs = ours(make()), make()
    theirs.resize_token_embeddings(323, mean_resizing=True)
    rows = IDS if request.param == "tied" else {"embed_tokens": IDS, "lm_head": IDS}
    theirs = get_peft_model(
        theirs, LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], trainable_token_indices=rows)
    )
    with torch.no_grad():
        for fqn, module in ((m.lora_fqn, m) for m in token_rows(mine).values()):
            generator = torch.Generator().manual_seed(len(fqn))
            module.lora_token_rows.add_(torch.randn(4, 64, generator=generator) * 0.1)
            of_peft = theirs.get_submodule(f"base_model.model.{fqn}")
            of_peft.token_adapter.trainable_tokens_delta["default"].copy_(module.whole_rows())
            weight = of_peft.token_adapter.base_layer.weight
            weight[320:] = 0  # 321 is nobody's
        for name, param in adapter_parameters(mine).items():
            if "lora_token" not in name:
                module, factor = name.removesuffix(".weight").rsplit(".", 1)
                layer = theirs.get_submodule(f"base_model.model.{module}")
                param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
                getattr(layer, f"lora_{factor[-1].upper()}")["default"].weight.copy_(param)
    yield mine, theirs


def test_values_and_gradients_are_pefts(pair: tuple[nn.Module, nn.Module]) -> None:
    mine, theirs = pair
    torch.testing.assert_close(mine(TEXT).logits, theirs(TEXT).logits, rtol=1e-5, atol=1e-5)
    loss_of(mine).backward()
    loss_of(theirs).backward()
    for module in token_rows(mine).values():
        of_peft = theirs.get_submodule(f"base_model.model.{module.lora_fqn}")
        expected = of_peft.token_adapter.trainable_tokens_delta["default"].grad
        assert (module.lora_token_rows.grad - expected).norm() < 1e-5 * expected.norm()
        assert expected.abs().amax(1).min() > 0
    trains = {name for name, param in mine.named_parameters() if param.requires_grad}
    assert trains == adapter_parameters(mine).keys() and not any("embed_tokens.weight" in name for name in trains)


def test_merges_are_pefts_and_a_tied_head_stays_tied(pair: tuple[nn.Module, nn.Module]) -> None:
    mine, theirs = pair
    expected = theirs(TEXT).logits
    tied = mine.lm_head.weight is mine.model.embed_tokens.weight
    merge_adapter(mine)
    torch.testing.assert_close(mine(TEXT).logits, expected, rtol=1e-5, atol=1e-5)
    unmerge_adapter(mine)
    torch.testing.assert_close(mine(TEXT).logits, expected, rtol=1e-5, atol=1e-5)
    merge_and_unload(mine)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(mine.model.embed_tokens.weight, merged.model.embed_tokens.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(mine.lm_head.weight, merged.lm_head.weight, rtol=0, atol=1e-6)
    assert (mine.lm_head.weight is mine.model.embed_tokens.weight) == tied
    assert type(mine.lm_head) is nn.Linear and type(mine.model.embed_tokens) is nn.Embedding
    assert mine.lm_head.out_features == mine.model.embed_tokens.num_embeddings == 323


def test_without_its_rows_a_model_is_its_base(pair: tuple[nn.Module, nn.Module]) -> None:
    mine, _ = pair
    base = tiny_llama() if mine.lm_head.weight is not mine.model.embed_tokens.weight else tiny_qwen3(tied=True)
    known = TEXT % 320
    with disable_adapter(mine):
        assert torch.equal(mine(known).logits[..., :320], base(known).logits)
    unload_adapter(mine)
    assert torch.equal(mine(known).logits[..., :320], base(known).logits)
    assert not adapter_parameters(mine) and not hasattr(mine.lm_head, "lora_embedding")


def test_models_with_them_are_copied_and_pickled(pair: tuple[nn.Module, nn.Module]) -> None:
    mine, _ = pair
    expected = mine(TEXT).logits
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert torch.equal(other(TEXT).logits, expected)
        with torch.no_grad():
            other.model.embed_tokens.lora_token_rows += 1  # a copy's own, its tied head's too
        assert not torch.equal(other(TEXT).logits, expected) and torch.equal(mine(TEXT).logits, expected)


def test_rows_begin_at_their_base_or_at_the_mean_of_all() -> None:
    model = ours(tiny_llama())
    for module in token_rows(model).values():
        base = module.weight.detach()[:320]
        assert not module.weight[320:].any()
        rows = module.whole_rows()
        assert torch.equal(rows[:2], base[[7, 319]])
        assert not torch.equal(rows[2], rows[3])
        torch.testing.assert_close(rows[2:], base.mean(0).expand(2, -1), rtol=0, atol=1e-4)
    again = token_rows(ours(tiny_llama()))
    assert all(torch.equal(again[name].whole_rows(), module.whole_rows()) for name, module in token_rows(model).items())


def test_new_rows_are_drawn_from_the_distribution_that_transformers_draws_from() -> None:
    """4000 draws: their mean to five standard errors, their covariance to a tenth of its norm."""
    base = torch.randn(500, 8, generator=torch.Generator().manual_seed(1)) @ torch.randn(8, 8) + 3
    drawn = mean_rows(base, range(4000)).double()
    wanted = 1e-9 * torch.cov(base.T.double(), correction=0)
    assert ((drawn.mean(0) - base.double().mean(0)).abs() < 5 * (wanted.diagonal() / 4000).sqrt() + 1e-6).all()
    noise = mean_rows((base - base.mean(0)), range(4000)).double()  # at zero fp32 shows its digits
    assert (torch.cov(noise.T, correction=0) - wanted).norm() < 0.1 * wanted.norm()


def test_nothing_as_large_as_the_vocabulary_is_saved() -> None:
    """Beside what the head's own logits are: with d, the backward keeps what is as large as tokens x width."""
    model, sizes = ours(tiny_llama()), []
    hidden = torch.randn(1, 2000, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.numel(), t.data_ptr())) or t, lambda t: t):
        model.lm_head(hidden).sum()
    own = {param.data_ptr() for param in model.parameters()}
    assert sum(size for size, place in sizes if place not in own) <= 2 * hidden.numel() + 1000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(target_modules=["q_proj", "lm_head"]), "lm_head is to have an adapter, and rows of its own"),
    ],
)
def test_what_trains_otherwise_is_refused_and_the_model_is_left_alone(config: LoRAConfig, message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError) as error:
        apply_lora(model, config, tokens=IDS)
    assert message in str(error.value)
    assert model.lm_head.weight.shape[0] == 320 and not adapter_parameters(model)


def test_a_package_of_rows_goes_to_rows_of_the_same_tokens() -> None:
    sender, other, same = tiny_llama(), tiny_llama(), tiny_llama()
    for model, tokens in ((sender, [7, 320]), (other, [8, 320]), (same, [320, 7])):
        apply_lora(model, LoRAConfig(rank=4, target_modules=["q_proj"]), tokens=tokens)
    with torch.no_grad():
        for param in adapter_parameters(sender).values():
            param += torch.randn(param.shape) * 0.1
    package = pack(sender, version=1, base="base")
    with pytest.raises(
        ValueError, match=r"rows are of the tokens \{.*\[7, 320\]\}, and this model's of \{.*\[8, 320\]\}"
    ):
        AdapterReceiver(other, base="base").receive(package)
    AdapterReceiver(same, base="base").receive(package)
    text = TEXT % 321
    assert torch.equal(same(text).logits, sender(text).logits)
    with pytest.raises(ValueError, match="lora_token_rows, which is no increment of a weight"):
        IncrementReceiver(tiny_llama(), base="base").receive(package)


def test_text_without_ids_and_ids_below_zero_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(
        ValueError, match=r"new_tokens = \['<a>'\], and apply_lora has no tokenizer to know their ids by"
    ):
        apply_lora(model, LoRAConfig(target_modules=["q_proj"], new_tokens=["<a>"]))
    with pytest.raises(ValueError, match=r"tokens = \[3, -1\]: \[-1\] are no ids"):
        apply_lora(model, LoRAConfig(target_modules=["q_proj"]), tokens=[3, -1])
    assert not adapter_parameters(model)
    apply_lora(model, LoRAConfig(target_modules=["q_proj"], new_tokens=["<a>"]), tokens=[3])
    assert adapter_parameters(model)["lm_head.lora_token_rows"].shape == (1, 64)


def test_a_head_with_a_bias_has_no_more_rows_and_the_model_is_left_alone() -> None:
    model = tiny_llama()
    model.lm_head = nn.Linear(64, 320)
    with pytest.raises(ValueError, match="lm_head has a bias, which is not grown"):
        apply_lora(model, LoRAConfig(target_modules=["q_proj"]), tokens=[320])
    assert not adapter_parameters(model) and len(model.model.embed_tokens.weight) == model.config.vocab_size == 320
    apply_lora(model, LoRAConfig(target_modules=["q_proj"]), tokens=[319])


@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_model_of_transformers_has_its_loss_and_is_saved(tied: bool, tmp_path: Path) -> None:
    model = ours(tiny_qwen3(tied=True) if tied else tiny_llama())
    torch.testing.assert_close(model(TEXT, labels=TEXT).loss, loss_of(model))
    merge_and_unload(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(again(TEXT).logits, model(TEXT).logits, rtol=1e-5, atol=1e-5)
    assert again.config.vocab_size == 323


def test_an_embedding_with_arithmetic_of_its_own_is_refused() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 8

    model = nn.ModuleDict({"embed_tokens": Scaled(9, 4), "q": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"embed_tokens is a Scaled, which computes in a way of its own"):
        apply_lora(model, LoRAConfig(target_modules=["q"]), tokens=[2])
    assert ROWS not in dict(model.named_parameters())
