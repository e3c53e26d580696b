"""Runs lm-eval's command line with the model ``river``, which releases up to 0.4.13 do not look for by themselves.

python -m river_compile.evaluation run --model river --model_args pretrained=FOLDER,quality=fast --tasks arc_easy
"""

from lm_eval.__main__ import cli_evaluate

from river_compile.evaluation import lm_eval_model  # noqa: F401 (it registers the model)

if __name__ == "__main__":
    cli_evaluate()
