"""Streams a LangChain chain (prompt, model, parser) whose model River accelerates.

    pip install langchain-huggingface
    python -m examples.langchain_pipeline --topic rainbows

Not handled: LangChain's chat models and agents, which build their prompts from messages.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import Runnable
from langchain_huggingface import HuggingFacePipeline
from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline

import river_compile
from river_compile.cli import shared
from tools import demo_models

TEMPLATE = "Explain {topic} in two sentences."


def chain_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, **options: Any
) -> Runnable[dict[str, Any], str]:
    """Return a chain from a topic to the model's text.

    Args:
        model: a causal language model, accelerated here.
        tokenizer: its tokenizer; a chat template of it wraps the prompt.
        max_new_tokens: longest answer.
        options: of `river_compile.accelerate`.
    """
    river_compile.accelerate(model, **options)
    text = pipeline(
        "text-generation",
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_full_text=False,
    )
    template = TEMPLATE
    if tokenizer.chat_template:
        message = [{"role": "user", "content": TEMPLATE}]
        template = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return PromptTemplate.from_template(template) | HuggingFacePipeline(pipeline=text) | StrOutputParser()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Streams a LangChain chain on an accelerated model.")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(demo_models.MODELS)} or a model folder")
    parser.add_argument("--topic", default="rainbows", help="topic to explain (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=96, help="longest answer (default: %(default)s)")
    options = parser.parse_args(arguments)
    shared.quiet()
    model, tokenizer = demo_models.load_or_exit(options.model)
    chain = chain_of(model, tokenizer, options.new_tokens)
    # LangChain waits a minute for each token, and the first call may compile for longer.
    model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=2)
    for piece in chain.stream({"topic": options.topic}):
        print(piece, end="", flush=True)
    print(f"\n\n{river_compile.report(model)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
