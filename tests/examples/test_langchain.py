"""A LangChain chain on an accelerated model, if langchain-huggingface is installed."""

import pytest
import torch
import transformers

pytest.importorskip("langchain_huggingface", reason="no extra installs langchain-huggingface")

from examples.langchain_pipeline import TEMPLATE, chain_of
from river_compile.reporting.trace import trace
from tests.support.lowerings import OPERATORS
from tests.support.tokenizers import save_tiny_llama

TOKENS = 12


def test_a_chain_streams_and_returns_the_models_own_text(tmp_path):
    folder = save_tiny_llama(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    ids = tokenizer(f"<{TEMPLATE.format(topic='rain')}>", return_tensors="pt")
    plain = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(plain, skip_special_tokens=True)
    chain = chain_of(
        model, tokenizer, TOKENS, kernels=OPERATORS, num_assistant_tokens_schedule="constant", background_packing=False
    )
    with trace() as seen:
        pieces = list(chain.stream({"topic": "rain"}))
        assert seen.cycles
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert chain.invoke({"topic": "rain"}) == text
    assert chain.batch([{"topic": "rain"}, {"topic": "rain"}]) == [text, text]
