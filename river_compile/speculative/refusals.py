"""Why exact mode cannot run on a model that was compiled in some way: errors that name the reason and the way out."""

from __future__ import annotations

from river_compile.config import RiverConfig
from river_compile.errors import ExactModeError
from river_compile.reporting.plain_runs import PlainRuns
from river_compile.state import BROKE, ModelState


def why_not(state: ModelState) -> str:
    """Returns why a prompt ran in none of the model's rewritten graphs."""
    if not state.graphs:
        return 'this model never reached it; call model.compile(backend="river")'
    plain = state.of(PlainRuns).reason
    if plain:
        return f"it ran without it: {plain}"
    refusals = [graph.refusal for graph in reversed(state.graphs) if graph.refusal]
    refusal = next((refusal for refusal in refusals if BROKE in refusal), refusals[0] if refusals else "")
    return f"it refused: {refusal}" if refusal else 'this call did not reach it: use model.compile(backend="river")'


def check_paths(config: RiverConfig) -> None:
    """Raises an ExactModeError where a model was compiled without its whole river or its whole backbone."""
    if config.prefill != "backbone":
        raise ExactModeError(
            f"prefill={config.prefill!r} lets prompts leave the backbone, so nothing could verify the drafts; compile "
            'the model with prefill="backbone"'
        )
    if config.exit_depth is not None:
        raise ExactModeError(
            f"exit_depth={config.exit_depth} leaves only one path in the compiled model; exact mode needs the whole "
            "river and the whole backbone: compile it without exit_depth"
        )
    if config.offload is not None and config.offload_policy == "exit":
        raise ExactModeError(
            f"offload={config.offload} with offload_policy='exit' makes every token leave by that depth; exact mode "
            "verifies with the whole backbone: compile the model with offload_policy='fetch'"
        )
