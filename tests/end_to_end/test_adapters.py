"""Low-rank adapters next to a model's matrices (LoRA), as PEFT puts them in: not merged, switched off, and merged."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import river_compile
from tests.support.examples import slow
from tests.support.families import make

ADAPTED = ("q_proj", "v_proj", "down_proj")
ALWAYS = {"group_size": 32, "quantizer": "rtn", "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}


class Adapted(nn.Module):
    """A linear layer with an adapter: two more in a row, the first of which reads what the layer reads."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base, self.on = base, True
        self.lora_a = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 4 * self.lora_b(self.lora_a(x)) if self.on else self.base(x)

    def merge(self) -> None:
        self.base.weight.add_(4 * self.lora_b.weight @ self.lora_a.weight)
        self.on = False


class LowRank(nn.Module):
    """A parametrization: a weight, and a product of two narrow matrices."""

    def __init__(self, weight: torch.Tensor, rank: int = 4) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / 5)
        self.b = nn.Parameter(torch.randn(weight.shape[0], rank) / 5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


def adapt(model: nn.Module) -> None:
    torch.manual_seed(0)
    for module in list(model.modules()):
        for name in ADAPTED:
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, Adapted(getattr(module, name)))
    model.eval()


def remove(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name in ADAPTED:
            if isinstance(getattr(module, name, None), Adapted):
                setattr(module, name, getattr(module, name).base)


def parametrized(model: nn.Module) -> None:
    torch.manual_seed(0)
    for name, module in [*model.named_modules()]:
        if name.endswith(ADAPTED):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight))


def unparametrized(model: nn.Module) -> None:
    for name, module in [*model.named_modules()]:
        if name.endswith(ADAPTED) and parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = make("llama", dtype, layers=2)
    adapt(model)
    return model


def text(model: nn.Module) -> list[int]:
    ids = torch.arange(7, 16)[None]
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, pad_token_id=0)[0].tolist()


@torch.no_grad()
@pytest.mark.slow
def test_exact_mode_follows_adapters():
    plain, model = (
        adapted(),
        river_compile.accelerate(adapted(), group_size=32, quantizer="rtn", num_assistant_tokens=3),
    )
    expected, found = [], []
    for change in (None, "off", "merge"):
        for m, texts in ((plain, expected), (model, found)):
            for module in m.modules():
                if isinstance(module, Adapted) and change is not None:
                    module.merge() if change == "merge" else setattr(module, "on", False)
            texts.append(text(m))
    assert found == expected
    assert expected[0] != expected[1]
    assert expected[0] == expected[2], "merging changes nothing but where the numbers are"
    report = river_compile.report(model)
    assert report.exact.cycles > 0, "the river drafted"


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [(adapt, remove), slow((parametrized, unparametrized))], ids=["modules", "parametrized"]
)
def test_adapters_come_and_go_after_accelerate(changes):
    """Each change is in the next text, the model continues to draft, and restore leaves the changed model."""
    plain, model = make("llama", layers=2), make("llama", layers=2)
    river_compile.accelerate(model, **ALWAYS)
    drafted, expected = 0, [text(plain)]
    assert text(model) == expected[0]
    for change in changes:
        change(plain)
        change(model)
        expected.append(text(plain))
        assert text(model) == expected[-1]
        before, drafted = drafted, river_compile.report(model).exact.by_source["river"][0]
        assert drafted > before
    assert expected[0] != expected[1]
    river_compile.restore(model)
    assert text(model) == expected[-1]


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_peft(when):
    """LoRA by PEFT, before and after accelerate: in use, switched off, and merged."""
    peft = pytest.importorskip("peft")
    plain, model = make("llama", layers=2), make("llama", layers=2)
    options = {"group_size": 32, "quantizer": "rtn", "num_assistant_tokens": 3}
    config = peft.LoraConfig(target_modules=list(ADAPTED), r=4, lora_alpha=16, init_lora_weights=False)
    if when == "after":
        river_compile.accelerate(model, **options)
        text(model)
    wrapped = []
    for one in (plain, model):
        torch.manual_seed(0)
        wrapped.append(peft.get_peft_model(one, config).eval())
    if when == "before":
        river_compile.accelerate(wrapped[1].get_base_model(), **options)
    assert text(wrapped[1]) == text(wrapped[0])
    with wrapped[0].disable_adapter(), wrapped[1].disable_adapter():
        assert text(wrapped[1]) == text(wrapped[0])
    assert text(wrapped[1].merge_and_unload()) == text(wrapped[0].merge_and_unload())
    assert river_compile.report(model).exact.cycles > 0


@pytest.mark.slow
def test_every_token_through_the_twins():
    """An adapter's first matrix is one product with its layer, in 4 bits; its second one reads too few features."""
    model = river_compile.accelerate(adapted(torch.bfloat16), quality="fast", exit_depth=0, group_size=32)
    assert len(text(model)) == 9 + 24
    packed = {site.name for site in river_compile.report(model).packed}
    assert any("q_proj.lora_a" in name for name in packed)
    assert not any("lora_b" in name for name in packed)
