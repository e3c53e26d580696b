"""Low-rank adapters next to a model's matrices (LoRA), as PEFT puts them in: not merged, switched off, and merged."""

import pytest
import torch
from torch import nn

import river_compile
from tests.support.families import make

ADAPTED = ("q_proj", "v_proj", "down_proj")


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


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = make("llama", dtype, layers=2)
    for module in list(model.modules()):
        for name in ADAPTED:
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, Adapted(getattr(module, name)))
    return model.eval()


def text(model: nn.Module) -> list[int]:
    ids = torch.arange(7, 16)[None]
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, pad_token_id=0)[0].tolist()


@torch.no_grad()
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


@pytest.mark.slow
def test_every_token_through_the_twins():
    """An adapter's first matrix is one product with its layer, in 4 bits; its second one reads too few features."""
    model = river_compile.accelerate(adapted(torch.bfloat16), quality="fast", exit_depth=0, group_size=32)
    assert len(text(model)) == 9 + 24
    packed = {site.name for site in river_compile.report(model).packed}
    assert any("q_proj.lora_a" in name for name in packed)
    assert not any("lora_b" in name for name in packed)
