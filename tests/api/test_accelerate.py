"""One line, ``accelerate(model)``: everything that generates keeps the plain text, and nothing is left in copies."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch._inductor.config as inductor
import transformers
from transformers import GenerationConfig, pipeline
from transformers.generation.streamers import BaseStreamer

import river_compile
from river_compile import errors
from river_compile.backend import river
from river_compile.errors import ExactModeError, OptionError, UnsupportedGraphError
from river_compile.record import find_record
from river_compile.reporting.report import Fallbacks
from river_compile.tracing.programs import ProgramCache
from river_compile.upstream.transformers import cache_argument, cache_of
from tests.support.decoding import new_cache
from tests.support.examples import slow
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS
from tests.support.tokenizers import byte_tokenizer
from tools.families.tiny import tiny_model

OPTIONS = {"kernels": OPERATORS, "group_size": 32}
EXACT = {**OPTIONS, "num_assistant_tokens": 1, "num_assistant_tokens_schedule": "constant"}


def plain():
    return make("llama", layers=2)


def generate(model, ids=None, **options):
    ids = prompt() if ids is None else ids
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, **options}
    return model.generate(ids, **options)


def texts(out):
    return out if isinstance(out, torch.Tensor) else out.sequences


class Streamer(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], 0

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.ended += 1


def streamed(model, **options):
    streamer = Streamer()
    generate(model, streamer=streamer, **options)
    return streamer.seen, streamer.ended


@pytest.fixture(scope="module")
def model():
    """One accelerated model for the tests that change nothing of it."""
    return river_compile.accelerate(plain(), **EXACT)


@pytest.fixture(scope="module")
def expected():
    """The plain model's text."""
    return generate(plain())


@pytest.mark.core
def test_generate_keeps_the_text_and_drafts(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with river_compile.trace() as trace:
            text = generate(model)
    assert torch.equal(text, generate(plain()))
    assert trace.cycles
    assert streamed(model) == streamed(plain())


def test_a_pipeline_of_an_accelerated_model_drafts(model):
    """Without further arguments."""
    texts = []
    for each in (model, plain()):
        generator = pipeline("text-generation", model=each, tokenizer=byte_tokenizer(), device="cpu")
        with river_compile.trace() as trace:
            texts.append(generator("abc", max_new_tokens=8, do_sample=False)[0]["generated_text"])
        assert bool(trace.cycles) == (each is model)
    assert texts[0] == texts[1]


@pytest.mark.core
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"use_cache": False}, "use_cache=False"),
    ],
)
def test_calls_that_exact_mode_refuses_run_plainly_with_one_notice(model, options, reason):
    """The text is the plain one, a second call says nothing more, and the report counts both."""
    generate(model)
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        text = texts(generate(model, **options))
        assert torch.equal(texts(generate(model, num_assistant_tokens=1, **options)), text)
    notices = [str(w.message) for w in notices if issubclass(w.category, river_compile.RiverWarning)]
    assert len(notices) == 1
    assert notices[0].startswith("RC064: LlamaForCausalLM.generate runs without River's drafts or exits: ")
    assert reason in notices[0]
    assert torch.equal(text, texts(generate(plain(), **options)))
    assert any(reason in why and n == 2 for why, n in river_compile.report(model).record.of(Fallbacks).items())
    assert reason in str(river_compile.report(model))


def test_a_streamer_sees_a_call_that_starts_again_once():
    model = river_compile.accelerate(plain(), **EXACT)  # (its own: the notice comes once a model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert streamed(model, use_cache=False) == streamed(plain(), use_cache=False)


def test_a_call_of_the_model_is_the_plain_models(model):
    """To the bit, before and after a text, and during one whose processor calls the model in the middle."""
    held = [{cache_argument(m): new_cache(m, "dynamic")} for m in (model, plain())]
    expected = generate(plain())
    inside = []

    def look(ids, scores):
        inside.append(model(ids).logits)
        return scores

    with torch.no_grad(), river_compile.trace() as trace:
        for ids in (prompt(), prompt(1, seed=3)):
            ours, theirs = (m(ids, **kept).logits for m, kept in zip((model, plain()), held, strict=True))
            assert torch.equal(ours, theirs)
        assert not trace.tokens
        assert torch.equal(generate(model, logits_processor=[look]), expected)
        assert torch.equal(inside[-1], plain()(expected[:, : inside[-1].shape[1]]).logits)
    assert model._compiled_call_impl is None


def test_callers_keep_their_own_custom_generate(model):
    def own(model, input_ids, **kwargs):
        return input_ids

    assert torch.equal(generate(model, custom_generate=own), prompt())


@pytest.mark.core
def test_copies_and_pickles_are_the_plain_model(tmp_path):
    """No attribute is left, and a pickle says nothing of this package."""
    model = river_compile.accelerate(plain(), **EXACT)
    model.generate(prompt(), max_new_tokens=1, do_sample=False)
    expected = generate(plain())
    saved = io.BytesIO()
    torch.save(model, saved)
    pickled = pickle.dumps(model)
    assert b"river_compile" not in pickled
    assert b"river_compile" not in saved.getvalue()
    model.save_pretrained(tmp_path)
    for copied in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickled)):
        assert set(vars(copied)) == set(vars(plain()))
        assert copied._compiled_call_impl is None
        assert type(copied) is type(model)
        assert torch.equal(generate(copied), expected)
    assert torch.equal(generate(type(model).from_pretrained(tmp_path)), expected)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.slow
def test_a_prompt_that_shows_no_draft_can_be_verified_goes_on_plainly():
    """CPM-Ant reads its whole text in every pass; a streamer, the cache handed back and the text are the plain ones."""
    ours, expected = tiny_model("cpmant"), tiny_model("cpmant")
    river_compile.accelerate(ours, **EXACT)
    with pytest.warns(river_compile.RiverWarning, match="CpmAntForCausalLM takes the whole text"):
        text = generate(ours)
    assert torch.equal(text, generate(expected))


@pytest.mark.parametrize("spoilt", [{}, {0: float("nan")}, {5: float("inf")}])
def test_scores_that_leave_nothing_to_sample_from_are_plain_samplings_error(model, spoilt):
    """All -inf, a NaN, an infinite one: in the fourth step of the second row, which drafts may have reached before."""

    def dead_end(ids, scores):
        if ids.shape[1] == prompt().shape[1] + 3:
            scores[-1] = torch.full_like(scores[-1], -torch.inf) if not spoilt else scores[-1]
            for token, score in spoilt.items():
                scores[-1, token] = score
        return scores

    for who in (plain(), model):
        with pytest.raises(RuntimeError, match=r"^probability tensor contains either `inf`, `nan` or element < 0"):
            who.generate(prompt(batch=2), max_new_tokens=8, do_sample=True, logits_processor=[dead_end])


def test_scores_with_one_token_left_are_sampled_and_greedy_text_asks_for_nothing(model):
    """Whatever is forbidden: plain greedy decoding takes a token all the same."""
    for options in ({"do_sample": True, "suppress_tokens": [*range(1, 128)]}, {"suppress_tokens": [*range(128)]}):
        texts = [who.generate(prompt(), max_new_tokens=4, **options) for who in (plain(), model)]
        assert torch.equal(*texts)


@pytest.mark.parametrize("options", [{"ids": prompt(batch=2).int()}, {"max_new_tokens": 5.0}, {"max_new_tokens": 4.5}])
def test_ids_in_32_bits_and_lengths_that_are_no_integers_give_plains_text(model, options):
    expected, text = (generate(who, **options) for who in (plain(), model))
    assert text.dtype == expected.dtype
    assert torch.equal(text, expected)


def test_rows_that_a_stop_string_ended_go_on_without_an_end_token_and_are_padded_with_one(model):
    """The three rows stop after two, six and nine new tokens."""
    for end, padding in (({}, 0), ({"eos_token_id": 127}, 7 + 3)):
        stops = {"stop_strings": ["'", ","], "tokenizer": byte_tokenizer()}
        expected, text = (generate(who, prompt(batch=3), max_new_tokens=12, **stops, **end) for who in (plain(), model))
        assert torch.equal(text, expected)
        assert (expected.shape[1] - 12, int((expected == 0).sum())) == (9, padding)


@pytest.mark.parametrize(("shape", "error"), [((1, 5), "tensor b (5)"), ((2, 12), "mat1 and mat2 shapes")])
def test_a_mask_of_the_wrong_shape_is_an_error_in_one_line(shape, error):
    """As the plain model has it, and not Dynamo's pages about fake tensors."""
    ours = river_compile.accelerate(plain(), **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError) as raised:
            generate(ours, attention_mask=torch.ones(shape, dtype=torch.long))
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_weight_that_is_no_number_is_named():
    ours = river_compile.accelerate(plain(), quantizer="rtn", **EXACT)
    torch.nn.init.constant_(ours.model.layers[1].mlp.up_proj.weight[3:4], float("nan"))
    with pytest.raises(UnsupportedGraphError, match=r"Cannot make a 4-bit twin of \S*layers\.1\.mlp\.up_proj: "):
        generate(ours)


def test_a_model_that_the_backend_cannot_reach_generates_plainly():
    """Also with a cache of the caller's, which holds the prompt by the time that this shows."""
    ours = river_compile.accelerate(plain(), **EXACT)
    with torch.compiler.set_stance("force_eager"), pytest.warns(river_compile.RiverWarning, match="runs without River"):
        out = generate(ours, return_dict_in_generate=True, **{cache_argument(ours): new_cache(ours, "dynamic")})
    assert torch.equal(out.sequences, generate(plain()))
    assert cache_of(out).get_seq_length() == out.sequences.shape[1] - 1


def test_without_a_compiler_strict_is_an_error():
    ours = river_compile.accelerate(plain(), strict=True)
    with inductor.patch({"cpp.cxx": (None, "false")}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ExactModeError, match="Install g"):
            generate(ours)


@pytest.mark.parametrize("quality", ["exact", "fast"])
def test_without_a_compiler_a_model_generates_plainly_with_one_warning(quality, expected):
    ours = river_compile.accelerate(plain(), quality)
    with inductor.patch({"cpp.cxx": (None, "false")}), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(generate(ours), expected)
        assert torch.equal(generate(ours), expected)
    (said,) = (str(w.message) for w in said if issubclass(w.category, river_compile.RiverWarning))
    assert "the model runs uncompiled" in said
    assert "Install g++" in said
    assert "Install g++" in str(river_compile.report(ours))


def test_without_a_compiler_a_model_is_refused_where_that_was_asked_for():
    ours = plain()
    ours.compile(backend="river", options={"on_unsupported": "raise"})
    with (
        inductor.patch({"cpp.cxx": (None, "false")}),
        pytest.raises(UnsupportedGraphError, match="Install g"),
    ):
        generate(ours)


def test_sampling_without_drafts_draws_what_plain_sampling_draws():
    ours, ids = river_compile.accelerate(plain(), **EXACT), prompt()
    drawn = []
    for model in (ours, plain()):
        torch.manual_seed(1)
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn.append(model.generate(ids, do_sample=True, max_new_tokens=8))
    assert torch.equal(*drawn)


def test_a_report_before_the_first_text_says_that_there_is_none():
    model = river_compile.accelerate(make("llama", layers=2))
    assert "nothing to report yet: the first call of generate" in str(river_compile.report(model))


@pytest.mark.core
def test_restore_takes_everything_back(model):
    """The generate of the class, the call, the twins; afterwards it can be accelerated again."""
    ours = river_compile.accelerate(plain(), **EXACT)
    generate(ours)
    assert river_compile.restore(ours) is ours
    assert set(vars(ours)) == set(vars(plain()))
    assert ours._compiled_call_impl is None
    assert find_record(ours) is None
    with river_compile.trace() as trace:
        assert torch.equal(generate(ours), generate(plain()))
    assert not trace.tokens
    assert river_compile.restore(ours) is ours
    river_compile.accelerate(ours, **EXACT)
    with river_compile.trace() as trace:
        assert torch.equal(generate(ours), generate(plain()))
    assert trace.cycles


def test_restore_leaves_what_other_backends_compiled():
    model = plain()
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    assert river_compile.restore(model)._compiled_call_impl is compiled


def test_fast_and_calibrated_let_tokens_leave():
    ours = river_compile.accelerate(plain(), "fast", threshold=-1.0, first_exit=1, **OPTIONS)
    with river_compile.trace() as trace:
        generate(ours)
    assert not trace.cycles
    assert {step.depth for step in trace.tokens} == {1}


@pytest.mark.slow
def test_fast_runs_in_the_own_loop_and_what_that_refuses_in_transformers(monkeypatch):
    """The streamer gets the prompt once either way; a custom_generate of the caller's is left alone."""
    ours, theirs = river_compile.accelerate(plain(), "fast", exit_depth=2, **OPTIONS), []
    loop = type(ours)._sample
    monkeypatch.setattr(type(ours), "_sample", lambda self, *a, **k: (theirs.append(self), loop(self, *a, **k))[1])
    whole = river_compile.restore(copy.deepcopy(ours))
    assert streamed(ours) == streamed(whole)
    assert theirs == [whole]
    assert torch.equal(generate(ours, num_beams=2), generate(whole, num_beams=2))
    refused = {"output_hidden_states": True, "return_dict_in_generate": True}
    assert streamed(ours, **refused) == streamed(whole, **refused)
    assert theirs == [whole, ours, whole]
    assert generate(ours, custom_generate=lambda *_, **__: "theirs") == "theirs"


def test_offload_streams_the_layers_that_verify_by_default(expected):
    """The printed call, with exact and with fast: each has the policy that works for it."""
    model = river_compile.accelerate(plain(), offload=1, **EXACT)
    with river_compile.trace() as trace:
        assert torch.equal(generate(model), expected)
    assert trace.cycles
    assert find_record(model).find(ProgramCache).config.offload_policy == "fetch"
    river_compile.accelerate(model, "fast", offload=1, first_exit=1, **OPTIONS)
    assert find_record(model).find(ProgramCache).config.offload_policy == "exit"


def test_strict_is_an_error_where_it_cannot_be_kept():
    with pytest.raises(ExactModeError, match="Cannot guarantee strict=True"):
        generate(river_compile.accelerate(plain(), strict=True, **EXACT))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quality": "exakt"}, "'exakt'.*exact"),
        ({"quality": "calibrated"}, "'calibrated' is not allowed; use calibration=, without quality"),
        ({"quality": "strict"}, "'strict' is not allowed; use strict=True"),
        ({"quality": "fast", "calibration": "nowhere.json"}, "an exit rule from nowhere.json"),
        ({"calibration": "nowhere.json"}, "an exit rule from nowhere.json"),
        ({"quality": "exact", "calibration": "c.json"}, "calibration= requires quality='fast', got 'exact'"),
        ({"threshold": 0.9}, "threshold=0.9 requires quality='fast', got 'exact'"),
        ({"quality": "fast", "strict": True}, "strict=True requires quality='exact', got 'fast'"),
        ({"tokenizer": byte_tokenizer()}, "tokenizer= requires calibration_data="),
        ({"calibration_data": ["text"]}, "Texts in calibration_data= require tokenizer="),
        ({"calibration_data": "text"}, "calibration_data='text' is not allowed; give a list"),
        ({"prefill": "exit"}, "^RC062: prefill='exit'"),
        ({"offload": 1, "offload_policy": "exit"}, r"^RC062: .*offload_policy='exit'.* layer 1\..*policy='fetch'"),
        ({"offload_policy": "fetch"}, "^RC003: offload_policy='fetch' requires offload="),
        ({"group_sise": 32}, "group_sise.*group_size"),
        ({"num_assistant_tokens": -1}, "num_assistant_tokens=-1"),
        (
            {"quality": "fast", "num_assistant_tokens": 3},
            "num_assistant_tokens=3 requires quality='exact', got 'fast'",
        ),
        ({"calibration": 3}, "calibration=3 is not allowed; it must be a path"),
        ({"twins": "/nope"}, "/nope/twins.safetensors: no such file"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(arguments, message):
    model = plain()
    with pytest.raises(ValueError, match=message):
        river_compile.accelerate(model, **arguments)
    assert model._compiled_call_impl is None
    assert "generate" not in vars(model)


@pytest.mark.parametrize(
    "step",
    [
        "river_compile.config.RiverConfig.from_options",
        "river_compile.api.quality.check_paths",
        "river_compile.decoding.setup.OwnCall",
        "river_compile.decoding.setup.ProgramCache",
        "river_compile.api.accelerate.has_generate_of_its_own",
        "river_compile.api.accelerate.generate_by",
        "river_compile.decoding.setup.begin_kernels",
        "river_compile.api.generation.MethodType",
        "river_compile.api.generation.keep_out_of_copies",
    ],
)
def test_an_accelerate_that_fails_leaves_the_model_as_it_was(model, expected, step, monkeypatch):
    """Whichever step fails: no attribute of a plain model changes, and an accelerated one drafts on."""

    def fail(*args, **kwargs):
        raise MemoryError

    for ours in (model, plain()):
        before = {name: id(value) for name, value in vars(ours).items()}
        with monkeypatch.context() as patch:
            patch.setattr(step, fail)
            with pytest.raises(MemoryError):
                river_compile.accelerate(ours, **EXACT)
        assert {name: id(value) for name, value in vars(ours).items()} == before
    with river_compile.trace() as trace:
        assert torch.equal(generate(model), expected)
    assert trace.cycles


def test_the_backends_mode_is_no_option_of_accelerate():
    with pytest.raises(OptionError, match="Unknown option 'mode'"):
        river_compile.accelerate(plain(), mode="max-autotune")


def test_a_call_that_was_compiled_before_follows_weights_after_accelerate():
    """`accelerate` forgets the graphs of earlier calls in its report; running them builds them again all the same."""
    model = plain()
    model.compile(backend=river, options={**OPTIONS, "exit_depth": 0})

    @torch.no_grad()
    def step():
        held = {cache_argument(model): new_cache(model, "static"), "use_cache": True}
        model.forward(prompt(), **held)
        return model(prompt(1, seed=3), **held).logits

    before = step()
    river_compile.accelerate(model, **EXACT)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    with pytest.warns(
        river_compile.RiverWarning, match="^RC048: The weights changed after their 4-bit twins were packed"
    ):
        assert not torch.equal(step(), before)


@pytest.mark.slow
def test_training_between_texts_is_as_without(recwarn):
    """Nothing but ``generate`` is another, so no graph that needs gradients comes to Dynamo."""
    models = plain(), river_compile.accelerate(plain(), **EXACT)
    found = []
    for model in models:
        texts = []
        for _ in range(2):
            loss = model.train()(prompt(), labels=prompt()).loss
            loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            texts.append((loss.item(), generate(model.eval()).tolist()))
        found.append(texts)
    expected, ours = found
    assert ours[0][0] == expected[0][0], "the first step's loss has the plain model's bits"
    assert [ids for _, ids in ours] == [ids for _, ids in expected]
    assert not any("cannot rewrite this graph" in str(w.message) for w in recwarn)


def test_from_pretrained_loads_and_accelerates(tmp_path):
    """With saved twins nothing is quantized, and the dtype is the folder's."""
    folder = tmp_path / "model"
    plain().save_pretrained(folder)
    first = river_compile.from_pretrained(folder, **EXACT)
    expected = generate(first)
    twins = river_compile.save_twins(first, tmp_path / "twins")
    model = river_compile.from_pretrained(folder, twins=twins, **EXACT)
    assert torch.equal(generate(model), expected)
    assert model.dtype == torch.float32
    assert all(matrix["folder"] for matrix in river_compile.report(model).to_dict()["matrices"])
    half = river_compile.from_pretrained(folder, quality="fast", dtype="bfloat16", **OPTIONS)
    assert half.dtype == torch.bfloat16


class Huge:
    """What a message cannot show whole."""

    def __repr__(self):
        return "huge " * 5000


@pytest.mark.parametrize("wrong", [3, "smollm2", {i: i for i in range(5000)}, Huge(), torch.nn.Linear])
def test_whatever_is_no_model_is_named_by_its_type(wrong):
    """By every function that takes a model, in one short line."""
    for take in (river_compile.accelerate, river_compile.restore, river_compile.report, river_compile.empty_cache):
        with pytest.raises(OptionError, match=f"model.*got {type(wrong).__name__}. See") as refused:
            take(wrong)
        assert len(str(refused.value)) < 130


@pytest.mark.parametrize(
    "name", ["quality", "calibration", "twins", "group_size", "threshold", "num_assistant_tokens", "strict"]
)
def test_a_wrong_value_is_shown_in_short(name):
    for wrong in (Huge(), plain(), {i: i for i in range(5000)}):
        with pytest.raises(OptionError, match=f"{name}=") as refused:
            river_compile.accelerate(plain(), **{name: wrong})
        assert len(str(refused.value)) < 300


def test_wrappers_are_refused_with_the_way_in():
    with pytest.raises(OptionError, match=r"before torch\.compile"):
        river_compile.accelerate(torch.compile(plain(), backend="eager"))
    with pytest.raises(OptionError, match="a transformers model that generates, got Linear"):
        river_compile.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(OptionError, match=r"got TextGenerationPipeline\. Pass pipeline\.model"):
        river_compile.accelerate(transformers.TextGenerationPipeline(plain(), byte_tokenizer()))


@pytest.mark.parametrize("given", ["texts", "ids"])
def test_calibration_data_is_what_the_twins_are_calibrated_on(given):
    data, tokenizer = [prompt(40)], None
    if given == "texts":
        data = ["a text like mine", "and another one"]
        tokenizer = lambda text: {"input_ids": [ord(c) % 100 for c in text]}  # noqa: E731
    options = {"quantizer": "gptq", "kernels": OPERATORS, "group_size": 32, "compile_cache": False}
    model = river_compile.accelerate(plain(), calibration_data=data, tokenizer=tokenizer, **options)
    generate(model)
    assert {twin.statistics.partition(" ")[2] for twin in river_compile.report(model).packed} == {"observed tokens"}


@pytest.fixture(scope="module")
def drafting():
    return river_compile.accelerate(plain(), **OPTIONS, num_assistant_tokens_schedule="constant")


class TestDraftSettings:
    """transformers' settings of assisted generation, as options of `accelerate`, keywords and in a config."""

    @staticmethod
    def drafted(model, **settings) -> list[tuple[str, ...]]:
        with river_compile.trace() as trace:
            text = generate(model, max_new_tokens=12, **settings)
        assert torch.equal(text, generate(plain(), max_new_tokens=12))
        return [cycle.drafted for cycle in trace.cycles]

    def test_a_keyword_goes_before_the_option(self, drafting):
        assert max(map(len, self.drafted(drafting, num_assistant_tokens=3, prompt_lookup_num_tokens=0))) == 3

    def test_a_config_counts_too_and_transformers_own_defaults_do_not(self, drafting):
        config = GenerationConfig(num_assistant_tokens=1, eos_token_id=None)
        assert max(map(len, self.drafted(drafting, generation_config=config, prompt_lookup_num_tokens=0))) == 1
        config = GenerationConfig(num_assistant_tokens=20, num_assistant_tokens_schedule="heuristic", eos_token_id=None)
        assert max(map(len, self.drafted(drafting, generation_config=config))) <= 15

    def test_copies_have_at_most_so_many_tokens(self, drafting):
        for most in (0, 2):
            cycles = self.drafted(drafting, prompt_lookup_num_tokens=most, num_assistant_tokens=7)
            assert all(drafted.count("lookup") <= most for drafted in cycles)

    def test_a_length_of_zero_means_no_drafts(self, drafting):
        assert self.drafted(drafting, num_assistant_tokens=0) == []

    @pytest.mark.parametrize("setting", [{"num_assistant_tokens": -1}, {"prompt_lookup_num_tokens": -1}])
    def test_bad_values_are_named(self, drafting, setting):
        ((name, value),) = setting.items()
        with pytest.raises(OptionError, match=f"{name}={value} is not allowed"):
            generate(drafting, **setting)


@pytest.mark.parametrize("when", [slow("before"), "after"])
def test_a_model_in_float64_generates_plainly_with_one_warning(when):
    model, expected = plain().double() if when == "before" else plain(), generate(plain().double())
    river_compile.accelerate(model, **{**EXACT, "kernels": "auto"})
    if when == "after":
        generate(model)
        model.to(torch.float64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(generate(model), expected)
        assert torch.equal(generate(model), expected)
    (said,) = [str(w.message) for w in said if issubclass(w.category, river_compile.RiverWarning)]
    assert "weights are float64" in said
    with river_compile.ContinuousBatch(model) as batch:
        assert torch.equal(batch.submit(lambda: generate(model)).result(), expected)


def test_every_error_is_a_river_error():
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    ours = [e for e in found if e.__module__ == errors.__name__ and not issubclass(e, Warning)]
    assert len(ours) > 8
    assert all(issubclass(error, river_compile.RiverError) for error in ours)
